"""Names of the folders and files of checkpoints.

RUN/checkpoints/step-00000500/          a published checkpoint
RUN/checkpoints/.step-00000500.tmp/     a checkpoint that is being written; never read
RUN/checkpoints/.step-00000500.deleted/ a checkpoint that is being deleted; never read
RUN/checkpoints/latest                  text: the name of the newest checkpoint
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_cpt.errors import RefusedError, UserError

FORMAT_VERSION = 1
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
RUN_FILE = "run.yaml"
PLAN_FILE = "plan.json"
LATEST_FILE = "latest"

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(tmp|deleted)")


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
    """Return the published checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=checkpoint_step
    )


def list_leftovers(folder: Path) -> list[Path]:
    """Return the folders of unfinished saves and of partly deleted checkpoints."""
    return sorted(path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name))


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a published checkpoint."""
    return (path / STATE_FILE).is_file()


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
        found = list_checkpoints(folder)
        if found:
            return found[-1]
    raise RefusedError(
        f"{path}: holds no checkpoint (no {STATE_FILE}, no checkpoints/step-*); give a checkpoint or a run"
    )
