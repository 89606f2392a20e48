"""Where checkpoints lie and what their folders are called.

RUN/checkpoints/step-00000500/      a published checkpoint
RUN/checkpoints/.step-00000500.tmp/ one being written; never read
RUN/checkpoints/.step-00000500.deleted/ one being deleted; never read
RUN/checkpoints/latest              text: the name of the newest
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
    """The folder of a run's checkpoints."""
    return Path(run_directory) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    match = _NAME.fullmatch(path.name)
    assert match, f"{path}: not the name of a checkpoint"
    return int(match.group(1))


def deleted_name(path: Path) -> Path:
    """What a checkpoint is called while it is deleted."""
    return path.with_name(f".{path.name}.deleted")


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=checkpoint_step
    )


def list_leftovers(folder: Path) -> list[Path]:
    """Folders of saves that did not end and of checkpoints half deleted."""
    return sorted(path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name))


def is_checkpoint(path: Path) -> bool:
    """Whether this folder is a published checkpoint of ours."""
    return (path / STATE_FILE).is_file()


def resolve_checkpoint(path: str | Path) -> Path:
    """What a user named: a checkpoint, or a run directory, which means its newest.

    Raises:
        UserError: there is nothing of that name.
        RefusedError: it is there, but neither a checkpoint nor a run with one.
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
