"""Errors of the operating system as messages: which file, what failed, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_cpt.errors import CptError
from megatron_cpt.files.resumable import SETTINGS_FILE
from megatron_cpt.files.terminal import escape

_ADVICE = {
    errno.ENOSPC: "free some space on the disk",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write smaller files",
    errno.EIO: "the disk does not read or write this file: check the kernel's log, and copy the file from elsewhere",
    errno.ENOENT: "it existed at the start: do not move or delete files while the command runs",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


@contextlib.contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Add a file's name to an `OSError` that has none, because the failed call knew only a file descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def os_errors_as_cpt_errors(work_folder: Path | None = None) -> Iterator[None]:
    """Turn an `OSError` inside the block into one message: which file, what failed, what to do, what is kept.

    Args:
        work_folder: folder of a resumable command that the block writes into.

    Raises:
        CptError: exit status 1, because neither the user nor the source is at fault.
    """
    try:
        yield
    except OSError as error:
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        message = f"{files or 'operating system'}: {error.strerror or error}"
        if error.errno in _ADVICE:
            message += f"; {_ADVICE[error.errno]}"
        if work_folder is not None and (work_folder / SETTINGS_FILE).is_file():
            message += f". Finished parts are kept in {work_folder}; run the same command again to resume"
        raise CptError(message) from error


def print_now(text: str) -> None:
    """Print a line to stderr, also inside a signal handler.

    If nobody reads stderr any more, it leads to /dev/null from then on: Ctrl-C also ends `tee` in `train 2>&1 | tee
    log`, and the run should still save.
    """
    try:
        # not print: its buffer may be locked by the code that the signal interrupted
        os.write(2, f"{escape(text)}\n".encode())
    except OSError:
        close_stderr()


def close_stderr() -> None:
    """Lead stderr to /dev/null."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
