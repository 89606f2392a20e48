"""What a checkpoint says in plain text beside its tensors: state.json, run.yaml, plan.json. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.checkpoint import layout
from megatron_cpt.config import read_mapping
from megatron_cpt.errors import RefusedError, UserError


@dataclass(frozen=True)
class Record:
    """The text of a checkpoint that is to be written.

    Attributes:
        state: counters, layout and versions, JSON-able (state.json).
        run: the resolved run.yaml as text.
        plan: the plan, JSON-able (plan.json).
    """

    state: Mapping[str, Any]
    run: str
    plan: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write the three files, durably."""
        plain = {layout.STATE_FILE: self.state, layout.PLAN_FILE: self.plan}
        texts = {name: orjson.dumps(value, option=orjson.OPT_INDENT_2) for name, value in plain.items()}
        for name, text in {**texts, layout.RUN_FILE: self.run.encode()}.items():
            with open(folder / name, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())


@contextlib.contextmanager
def corrupt_as_refused(checkpoint: object) -> Iterator[None]:
    """Around what takes a record apart: with `checkpoint.verify: none` it may be JSON or YAML and yet no record.

    Raises:
        RefusedError: naming the checkpoint, where something is missing or of another kind.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError(
            f"{checkpoint}: {layout.STATE_FILE} or {layout.RUN_FILE} is damaged ({type(error).__name__}: {error}); "
            "use another checkpoint"
        ) from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json.

    Raises:
        RefusedError: it cannot be read, it is not the state of a run, or it is of a newer format.
    """
    path = checkpoint / layout.STATE_FILE
    state = read_json(path)
    try:
        version = int(state["format_version"])
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{path}: damaged: no format_version") from error
    if version > layout.FORMAT_VERSION:
        raise RefusedError(
            f"{checkpoint}: format version {version}, this software reads up to {layout.FORMAT_VERSION}; update it"
        )
    return state


def read_run(folder: Path) -> dict[str, Any]:
    """The resolved run.yaml of a checkpoint or a run directory, as plain values.

    Raises:
        RefusedError: it cannot be read.
    """
    try:
        return read_mapping(folder / layout.RUN_FILE)
    except UserError as error:  # what is a mistake in the file of a user is damage in one that we wrote
        raise RefusedError(f"damaged: {error}") from error


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan.json of a checkpoint or a run directory.

    Raises:
        RefusedError: it cannot be read.
    """
    return read_json(folder / layout.PLAN_FILE)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        RefusedError: it does not.
    """
    try:
        plain = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: missing or damaged ({error})") from error
    if not isinstance(plain, dict):
        raise RefusedError(f"{path}: damaged: not an object")
    return plain
