"""A Hugging Face folder as a checkpoint for as long as a command needs one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_cpt.backend.collectives import on_main
from megatron_cpt.backend.distributed import launched_rank
from megatron_cpt.checkpoint.layout import (
    RUN_FILE,
    checkpoint_name,
    checkpoints_folder,
    is_checkpoint,
    list_checkpoints,
)
from megatron_cpt.convert.importer import import_checkpoint
from megatron_cpt.errors import CptError
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors, without_resume_advice

Note = Callable[[str], None]


@contextlib.contextmanager
def as_checkpoint(model: Path, beside: Path | None = None, note: Note = lambda activity: None) -> Iterator[Path]:
    """Yield the path of a checkpoint: `model` itself, or a temporary import of a Hugging Face folder; a collective.

    The import is deleted at the end of the block; inside `stops_as_interrupts`, also after a stop signal.

    Args:
        model: a checkpoint, a run directory or a Hugging Face folder.
        beside: file in whose folder the import is made, on a disk that all nodes share; None: the system's own place
            for temporary files.
        note: called on rank 0 before an import, with what is being done.

    Raises:
        UserError: the folder cannot be imported.
    """
    is_ours = is_checkpoint(model) or list_checkpoints(checkpoints_folder(model)) or (model / RUN_FILE).is_file()
    if is_ours or not (model / "config.json").is_file():
        yield model
        return
    folder = Path(on_main(lambda: _import_aside(model, beside, note)))
    try:
        yield folder / checkpoint_name(0)
    finally:
        if launched_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _import_aside(model: Path, beside: Path | None, note: Note) -> str:
    with os_errors_as_cpt_errors():
        if beside is not None:
            beside.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{model.name}-", dir=beside.parent if beside is not None else None)
        try:
            note(f"importing {model} to a temporary checkpoint in {folder}")
            import_checkpoint(model, Path(folder) / checkpoint_name(0))
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, CptError):
                error.args = (without_resume_advice(str(error)),)
            raise
    return folder
