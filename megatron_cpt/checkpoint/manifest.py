"""The manifest: size and checksum of every file of a checkpoint, written last and compared before anything is used.

    {"format_version": 2, "algorithm": "xxh3_128", "files": {"state.json": {"size": 717, "checksum": "a9..."}, ...},
     "checksum": "0f..."}

The last checksum covers the manifest itself, so it stays in all later formats. A checkpoint that was made of other
checkpoints also has `provenance`: the command, its inputs with their digests, and what it computed. Format 1 has no
version and no checksum of its own; its checksums are of `xxh3_128`, or of `sha256` under that key.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import orjson

from megatron_cpt.checkpoint.layout import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    PLAN_FILE,
    RUN_FILE,
    STATE_FILE,
    NewerFormatError,
    refuse_newer_format,
)
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.checksum import ALGORITHM, Checksum, file_checksum
from megatron_cpt.files.retry import is_path_error, retry_disk
from megatron_cpt.files.whole_io import is_regular_file, read_file

Verify = Literal["full", "sampled", "none"]
SAMPLED_SHARE = 16  # a sampled verification takes one shard in 16
DAMAGE_ADVICE = "choose another checkpoint, or copy this one again"
_REQUIRED = (STATE_FILE, RUN_FILE, ".metadata", "metadata.json")
_READ = (*_REQUIRED, PLAN_FILE, "common.pt")  # small files that are read, so none may exist without a checksum
_CHECKSUM_KEYS = {ALGORITHM: "checksum", "sha256": "sha256"}  # per algorithm, the key in an entry
_THREADS = 2  # hashing releases Python's lock, so two files at a time use two cores


class CorruptCheckpointError(RefusedError):
    """Files of a checkpoint differ from what was written.

    Attributes:
        path: the checkpoint.
        faults: one line per fault.
    """

    def __init__(self, path: Path, faults: Sequence[str]) -> None:
        super().__init__(f"{path}: corrupt: {'; '.join(faults)}; use another checkpoint")
        self.path, self.faults = path, list(faults)


@dataclass(frozen=True)
class FileDigest:
    """Size of a file in bytes, and its checksum."""

    size: int
    checksum: str
    algorithm: str = ALGORITHM


def digest(path: Path, algorithm: str = ALGORITHM) -> FileDigest:
    """Return the size and the checksum of a file."""
    return FileDigest(path.stat().st_size, file_checksum(path, algorithm=algorithm), algorithm)


def manifest_text(files: Mapping[str, FileDigest], provenance: Mapping[str, Any] | None = None) -> str:
    """Return the content of a manifest of the present format.

    Args:
        provenance: the command and the inputs of a checkpoint that was made of other checkpoints.
    """
    entries = {name: {"size": files[name].size, "checksum": files[name].checksum} for name in sorted(files)}
    plain: dict[str, Any] = {"format_version": FORMAT_VERSION, "algorithm": ALGORITHM, "files": entries}
    if provenance is not None:
        plain["provenance"] = dict(provenance)
    return orjson.dumps({**plain, "checksum": _own_checksum(plain)}, option=orjson.OPT_INDENT_2).decode()


def _own_checksum(plain: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest without its key `checksum`, independent of spaces and of the order of keys."""
    content = {key: value for key, value in plain.items() if key != "checksum"}
    return str(Checksum(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest())


def read_manifest(checkpoint: Path) -> dict[str, FileDigest]:
    """Return the files that a checkpoint must have, by name.

    Raises:
        NewerFormatError: the manifest is of a newer format.
        RefusedError: it is missing or damaged, or lacks a file that a load would read.
        OSError: the disk failed.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        if path.is_symlink() or not is_regular_file(path):  # a named pipe would block the read
            raise ValueError("no regular file")
        files = _parse(path, orjson.loads(read_file(path)))
        missing = [name for name in _REQUIRED if name not in files]
        if missing or not any(map(is_shard, files)):
            raise ValueError(f"no entry for {', '.join(missing) or 'any shard'}")
        names = retry_disk(checkpoint, lambda: os.listdir(checkpoint))
        unlisted = [name for name in sorted(names) if name not in files and _is_read(name)]
        if unlisted:
            raise ValueError(f"no entry for {', '.join(unlisted)}")
    except NewerFormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and not is_path_error(error):
            raise
        raise RefusedError(f"{path}: missing or damaged ({error}); {DAMAGE_ADVICE}") from error
    return files


def _parse(path: Path, plain: Any) -> dict[str, FileDigest]:
    if plain.keys() != {"algorithm", "files"}:  # not format 1
        if _own_checksum(plain) != plain["checksum"]:
            raise ValueError("its own checksum differs")
        refuse_newer_format(path, plain["format_version"])
    algorithm = plain["algorithm"]
    if algorithm not in _CHECKSUM_KEYS:
        raise ValueError(f"checksums by {algorithm}")
    key = _CHECKSUM_KEYS[algorithm]
    return {name: FileDigest(int(entry["size"]), str(entry[key]), algorithm) for name, entry in plain["files"].items()}


def _is_read(name: str) -> bool:
    return is_shard(name) or name in _READ


def is_shard(name: str) -> bool:
    """Return whether a file holds tensors; all other files are small."""
    return name.startswith("__")


def sample(checkpoint: Path, names: Collection[str]) -> set[str]:
    """Return the files whose checksums a `sampled` verification compares: every small file, and one shard in 16.

    The choice depends on the checkpoint's name only: the same checkpoint gets the same verdict every time, and over
    many checkpoints every shard has its turn.
    """
    shards = [name for name in names if is_shard(name)]
    keys = {name: hashlib.sha256(f"{checkpoint.name}/{name}".encode()).digest() for name in shards}
    drawn = sorted(shards, key=lambda name: keys[name])[: -(-len(shards) // SAMPLED_SHARE)]
    return {*drawn, *(set(names) - set(shards))}


def _chosen(checkpoint: Path, names: Collection[str], how: Verify) -> set[str]:
    if how == "none":
        return set()
    return set(names) if how == "full" else sample(checkpoint, names)


def shards_to_compare(
    checkpoint: Path, how: Verify, manifest: Mapping[str, FileDigest] | None = None
) -> dict[str, FileDigest]:
    """Return the shards whose checksums a verification compares, in the order of writing: rank 0 comes first.

    Raises:
        RefusedError: the manifest is missing or damaged.
    """
    files = read_manifest(checkpoint) if manifest is None else manifest
    names = [name for name in _chosen(checkpoint, files, how) if is_shard(name)]
    # numbers instead of letters: __2_9.distcp comes before __2_10.distcp
    return {name: files[name] for name in sorted(names, key=lambda name: list(map(int, re.findall(r"\d+", name))))}


def find_faults(
    checkpoint: Path,
    how: Verify = "full",
    *,
    with_shards: bool = True,
    manifest: Mapping[str, FileDigest] | None = None,
) -> list[str]:
    """Return one line for each fault in a checkpoint's files; an empty list means that the checkpoint is valid.

    Args:
        checkpoint: its folder.
        how: which checksums to compare. Every file must exist with its size in any case.
        with_shards: compare the checksums of shards, too, instead of small files only.
        manifest: of the checkpoint, if it was read before.

    Raises:
        RefusedError: the manifest is missing or damaged.
    """
    files = read_manifest(checkpoint) if manifest is None else manifest
    chosen = {name for name in _chosen(checkpoint, files, how) if with_shards or not is_shard(name)}
    faults, to_hash = [], []
    for name, expected in sorted(files.items()):
        path = checkpoint / name
        if not _is_inside(name):
            faults.append(f"{name}: not a file of this folder")
        elif not is_regular_file(path) or _passes_a_link(checkpoint, name):
            faults.append(f"{name}: missing")
        elif (size := path.stat().st_size) != expected.size:
            faults.append(f"{name}: {size} bytes, should be {expected.size}")
        elif name in chosen:
            to_hash.append(name)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: compare(checkpoint, name, files[name]), to_hash)
        return [*faults, *(fault for fault in found if fault is not None)]


def compare(
    checkpoint: Path, name: str, expected: FileDigest, progress: Callable[[int], None] = lambda num_bytes: None
) -> str | None:
    """Return the fault in a file's content, or None; see `file_checksum` for `progress`.

    Raises:
        OSError: the file cannot be read.
    """
    if file_checksum(checkpoint / name, progress, expected.algorithm) == expected.checksum:
        return None
    return f"{name}: checksum differs: the content is damaged"


def _passes_a_link(checkpoint: Path, name: str) -> bool:
    """Return whether the file or a folder between it and the checkpoint is a symbolic link."""
    path = checkpoint / name
    return any(part.is_symlink() for part in (path, *path.parents) if checkpoint in part.parents)


def _is_inside(name: str) -> bool:
    """Return whether a name means a file in the folder or up to two levels below it (`hf/config.json`)."""
    parts = PurePosixPath(name).parts
    return 1 <= len(parts) <= 3 and "/".join(parts) == name and ".." not in parts and parts[0] != "/"
