"""Names of the folders and files of checkpoints.

RUN/checkpoints/step-00000500/          a published checkpoint
RUN/checkpoints/.step-00000500.tmp/     a checkpoint that is being written; never read
RUN/checkpoints/.step-00000500.deleted/ a checkpoint that is being deleted; never read
RUN/checkpoints/latest                  text: the name of the newest checkpoint
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import orjson

from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.whole_io import read_file

FORMAT_VERSION = 2
"""Version of state.json and manifest.json; docs/operations/checkpoints.md lists what each version changed."""
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
RUN_FILE = "run.yaml"
PLAN_FILE = "plan.json"
LATEST_FILE = "latest"

# a Hugging Face folder; the folder of Megatron's --save; one of its checkpoints
_FILES_OF_OTHER_PROJECTS = ("config.json", "latest_checkpointed_iteration.txt", ".metadata")

_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")  # [0-9]: \d also matches digits of other scripts
_LEFTOVER = re.compile(rf"\.{_NAME.pattern}\.(tmp|deleted)")


class NewerFormatError(RefusedError):
    """A checkpoint is of a newer version of this software; it is not corrupt, so no run falls back to an older one."""


def refuse_newer_format(path: Path, version: int) -> None:
    """Refuse a file of a format that this version does not know.

    Raises:
        NewerFormatError: the version is newer than `FORMAT_VERSION`.
    """
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path}: format version {version}, this software reads up to {FORMAT_VERSION}; update it"
        )


def checkpoints_folder(run_directory: str | Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(run_directory) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    match = _NAME.fullmatch(path.name)
    assert match, f"{path}: not the name of a checkpoint"
    return int(match.group(1))


def deleted_name(path: Path) -> Path:
    """Return the name that a checkpoint has while it is deleted."""
    return path.with_name(f".{path.name}.deleted")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the published checkpoints in a folder, oldest first; none of them is opened."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((folder / name for name in names), key=checkpoint_step)


def list_ignored(folder: Path) -> list[str]:
    """Return the names in a folder of checkpoints that look like a checkpoint or like `latest` and are neither."""
    if not folder.is_dir():
        return []
    found = {path.name for path in list_checkpoints(folder)}
    return [
        name
        for name in sorted(os.listdir(folder))
        if (name.startswith("step-") and name not in found) or (name == LATEST_FILE and not has_latest(folder))
    ]


def has_latest(folder: Path) -> bool:
    """Return whether `latest` is a regular file. Its content decides nothing, so it is never opened."""
    try:
        return stat.S_ISREG(os.lstat(folder / LATEST_FILE).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def list_leftovers(folder: Path) -> list[Path]:
    """Return the folders of unfinished saves and of partly deleted checkpoints."""
    return sorted(path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name))


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a published checkpoint."""
    return (path / STATE_FILE).is_file()


def has_own_name(path: Path) -> bool:
    """Return whether the step in a checkpoint's name is the step it holds: not so for `cp -r step-00000004 step-99...`.

    A checkpoint whose state.json cannot be read keeps the benefit of the doubt: whoever loads it says what is wrong.
    """
    try:
        if not is_checkpoint(path):
            return True
        return bool(orjson.loads(read_file(path / STATE_FILE))["train"]["step"] == checkpoint_step(path))
    except (OSError, ValueError, LookupError, TypeError):
        return True


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that a user names: its folder, or a run directory, which means the newest one in it.

    Raises:
        UserError: the path does not exist.
        RefusedError: the path is neither a checkpoint nor a run with one.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint or run directory; give the path of one")
    if is_checkpoint(path):
        return path
    for folder in (checkpoints_folder(path), path):
        for found in reversed(list_checkpoints(folder)):
            if has_own_name(found):
                return found
    advice = "give a checkpoint or a run"
    if any((path / name).exists() for name in _FILES_OF_OTHER_PROJECTS):
        advice = f"import the weights first: megatron-cpt convert import {path} CKPT"
    raise RefusedError(f"{path}: holds no checkpoint of ours (no {STATE_FILE}, no checkpoints/step-*); {advice}")
