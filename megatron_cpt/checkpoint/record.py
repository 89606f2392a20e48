"""Text files of a checkpoint beside its tensors: state.json, run.yaml, plan.json. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.manifest import DAMAGE_ADVICE, FileDigest, digest, is_shard, read_manifest
from megatron_cpt.config import read_mapping
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import DiskFile, is_regular_file, read_file

WeightSet = Literal["raw", "ema"]
"""Weights of a checkpoint: the weights of its step, or their moving average."""


@dataclass(frozen=True)
class Record:
    """Text files of a checkpoint that is about to be written: state.json, the text of run.yaml, and plan.json."""

    state: Mapping[str, Any]
    run: str
    plan: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write the three files and fsync them."""
        plain = {layout.STATE_FILE: self.state, layout.PLAN_FILE: self.plan}
        texts = {name: orjson.dumps(value, option=orjson.OPT_INDENT_2) for name, value in plain.items()}
        for name, text in {**texts, layout.RUN_FILE: self.run.encode()}.items():
            with DiskFile(folder / name, "wb") as file:
                file.write(text)
                file.sync()


@dataclass(frozen=True)
class SavedRun:
    """Text files of a published checkpoint, read once and passed to everything that resumes from it.

    Attributes:
        path: the checkpoint's folder.
        manifest: size and checksum of each of its files, by name.
        state: state.json: counters, layout and versions.
        run: the resolved run.yaml as plain values.
    """

    path: Path
    manifest: Mapping[str, FileDigest]
    state: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def run_id(self) -> str | None:
        """Id of the run that saved it; None: of format 1, or imported."""
        return self.state.get("run_id")

    @property
    def has_ema(self) -> bool:
        """True if it holds a moving average of the weights."""
        return self.run.get("ema") is not None

    def weights_digest(self, weights: WeightSet = "raw") -> str:
        """Return a digest of its tensors and its model section; a renamed or copied checkpoint has the same one."""
        shards = {name: entry.checksum for name, entry in sorted(self.manifest.items()) if is_shard(name)}
        parts = [shards, self.run.get("model"), *(["ema"] if weights == "ema" else [])]
        return f"sha256:{hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()}"


def read_saved_run(checkpoint: Path, manifest: Mapping[str, FileDigest] | None = None) -> SavedRun:
    """Read the text files of a checkpoint.

    Args:
        checkpoint: its folder.
        manifest: its manifest, if `find_faults` has compared the files with it.

    Raises:
        RefusedError: a file is missing, damaged or of a newer format.
    """
    if manifest is None:
        manifest = read_manifest(checkpoint)
        for name in (layout.STATE_FILE, layout.RUN_FILE):
            path = checkpoint / name
            if not is_regular_file(path) or digest(path, manifest[name].algorithm) != manifest[name]:
                problem = f"missing, or different from what {layout.MANIFEST_FILE} lists"
                raise RefusedError(f"{path}: {problem}; {DAMAGE_ADVICE}")
    with corrupt_as_refused(checkpoint):
        return SavedRun(checkpoint, manifest, read_state(checkpoint), read_run(checkpoint))


def no_ema_error(checkpoint: Path) -> UserError:
    """Return the error for `--weights ema` on a checkpoint without a moving average."""
    return UserError(
        f"--weights ema: {checkpoint}: has no moving average, because its run had no `ema` section; "
        "omit --weights, or choose a checkpoint of a run with `ema`"
    )


@contextlib.contextmanager
def corrupt_as_refused(checkpoint: object) -> Iterator[None]:
    """Turn errors from the content of state.json or run.yaml into a refusal that names the checkpoint.

    With `checkpoint.verify: none` a damaged file may be valid JSON or YAML and still lack what a run needs.

    Raises:
        RefusedError: something is missing or of the wrong type.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError(
            f"{checkpoint}: {layout.STATE_FILE} or {layout.RUN_FILE} is damaged ({type(error).__name__}: {error}); "
            f"{DAMAGE_ADVICE}"
        ) from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json.

    Raises:
        RefusedError: it cannot be read, has no format version, or is of a newer format.
    """
    path = checkpoint / layout.STATE_FILE
    state = read_json(path)
    try:
        version = int(state["format_version"])
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{path}: damaged: no format_version; {DAMAGE_ADVICE}") from error
    layout.refuse_newer_format(path, version)
    return state


def read_run(folder: Path) -> dict[str, Any]:
    """Return the resolved run.yaml of a checkpoint or a run directory, as plain values.

    Raises:
        RefusedError: it cannot be read.
    """
    try:
        return read_mapping(folder / layout.RUN_FILE)
    except UserError as error:  # an error in a user's file means damage in a file that we wrote
        raise RefusedError(f"damaged: {error}; {DAMAGE_ADVICE}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        RefusedError: it is missing, damaged or holds something else.
    """
    try:
        plain = orjson.loads(read_file(path))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not is_path_error(error):
            raise
        raise RefusedError(f"{path}: missing or damaged ({error}); copy the file again, or make it again") from error
    if not isinstance(plain, dict):
        raise RefusedError(f"{path}: damaged: not an object; copy the file again, or make it again")
    return plain
