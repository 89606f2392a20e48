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

_TORCH_OUT_OF_MEMORY = "DefaultCPUAllocator: "
_ADVICE = {
    errno.ENOSPC: "free some space on the disk",
    errno.EDQUOT: "free some space, or have the quota raised",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or write smaller files",
    errno.EIO: "the disk does not read or write this file: check the kernel's log, and copy the file from elsewhere",
    errno.ESTALE: "the file server no longer knows this file: check the mount, then run the command again",
    errno.ETIMEDOUT: "the file server does not answer: check it and the network, then run the command again",
    errno.ENOENT: "it existed at the start: do not move or delete files while the command runs",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


@contextlib.contextmanager
def os_errors_as_cpt_errors(work_folder: Path | None = None) -> Iterator[None]:
    """Turn an `OSError` or `MemoryError` in the block into one message: what failed, what to do, what is kept.

    Args:
        work_folder: folder of a resumable command that the block writes into.

    Raises:
        CptError: exit status 1, because neither the user nor the source is at fault.
    """
    try:
        yield
    except OSError as error:
        raise CptError(describe_os_error(error) + _kept_parts(work_folder)) from error
    except MemoryError as error:
        message = f"out of memory{f': {error}' if str(error) else ''}; use fewer --workers, or free some memory"
        raise CptError(message + _kept_parts(work_folder)) from error
    except RuntimeError as error:
        if _TORCH_OUT_OF_MEMORY not in str(error):
            raise
        reason = str(error).partition(_TORCH_OUT_OF_MEMORY)[2].strip(": ").partition("\n")[0]
        message = f"out of memory: {reason}; use fewer --workers, or free some memory"
        raise CptError(message + _kept_parts(work_folder)) from error


_KEPT_PARTS = ". Finished parts are kept in"


def _kept_parts(work_folder: Path | None) -> str:
    if work_folder is None or not (work_folder / SETTINGS_FILE).is_file():
        return ""
    return f"{_KEPT_PARTS} {work_folder}; run the same command again to resume"


def without_resume_advice(message: str) -> str:
    """Return the message of a failure whose finished parts are not kept after all."""
    return message.partition(_KEPT_PARTS)[0]


def describe_os_error(error: OSError) -> str:
    """Return one line: the file, what failed, and what to do."""
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    message = f"{files or 'operating system'}: {error.strerror or error}"
    return f"{message}; {_ADVICE[error.errno]}" if error.errno in _ADVICE else message


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
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
