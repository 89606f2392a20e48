"""A Hugging Face folder as a checkpoint for as long as a command needs one."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_cpt.backend.collectives import on_main
from megatron_cpt.backend.distributed import launched_rank
from megatron_cpt.checkpoint.layout import checkpoint_name, checkpoints_folder, is_checkpoint, list_checkpoints
from megatron_cpt.convert.importer import import_checkpoint
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors

Note = Callable[[str], None]


@contextlib.contextmanager
def as_checkpoint(model: Path, beside: Path | None = None, note: Note = lambda activity: None) -> Iterator[Path]:
    """Yield the path of a checkpoint: `model` itself, or a temporary import of a Hugging Face folder; a collective.

    The import is deleted at the end of the block, also after Ctrl-C and SIGTERM.

    Args:
        model: a checkpoint, a run directory or a Hugging Face folder.
        beside: file in whose folder the import is made, on a disk that all nodes share; None: the system's own place
            for temporary files.
        note: called on rank 0 before an import, with what is being done.

    Raises:
        UserError: the folder cannot be imported.
    """
    if is_checkpoint(model) or list_checkpoints(checkpoints_folder(model)) or not (model / "config.json").is_file():
        yield model
        return
    with _terminated_as_interrupted():
        folder = Path(on_main(lambda: _import_aside(model, beside, note)))
        try:
            yield folder / checkpoint_name(0)
        finally:
            if launched_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that nothing of the size of a model stays behind."""
    if threading.current_thread() is not threading.main_thread():  # only that one may have handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _import_aside(model: Path, beside: Path | None, note: Note) -> str:
    with os_errors_as_cpt_errors():
        if beside is not None:
            beside.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{model.name}-", dir=beside.parent if beside is not None else None)
        try:
            note(f"importing {model} to a temporary checkpoint in {folder}")
            import_checkpoint(model, Path(folder) / checkpoint_name(0))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder
