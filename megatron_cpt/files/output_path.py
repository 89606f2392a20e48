"""Check of output paths before any work is done for them."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_cpt.errors import UserError
from megatron_cpt.files.whole_io import exists, is_folder, is_regular_file

_ROOM = 128  # bytes that names inside a folder may add to its path


def output_problem(path: str | Path, *, ending: str = "") -> str | None:
    """Return why nothing can be written under a path, as the end of a sentence; None if nothing speaks against it.

    Nothing is created: the nearest folder that exists must be writable. A full disk is not found.

    Args:
        ending: the longest ending that is added to the last name of the path, such as `.bin.tmp-12345`.
    """
    if "\0" in os.fspath(path):
        return "holds a zero byte; choose another name"
    full = Path(os.path.abspath(os.fspath(path) + ending))
    folder = next(each for each in (Path(path), *full.parents) if exists(each))
    longest = max((os.fsencode(name) for name in full.parts), key=len)
    if len(longest) > _limit(folder, "PC_NAME_MAX", 255):
        return f"the name {os.fsdecode(longest[:20])}... has {len(longest)} bytes, too many for the file system"
    if (num_bytes := len(os.fsencode(full))) + _ROOM > _limit(folder, "PC_PATH_MAX", 4096):
        return f"has {num_bytes} bytes, too many for a path; choose a shorter one"
    if not is_folder(folder):
        return f"{folder} is not a folder; choose another place"
    if not os.access(folder, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        reason = "is on a read-only file system" if is_read_only else "is not writable for this user"
        return f"{folder} {reason}; choose another place, or change it"
    return None


def file_problem(path: Path) -> str | None:
    """Return why `write_output` cannot write a file, as `output_problem` does."""
    if is_folder(path):
        return "is a folder; give the name of a file"
    if exists(path):
        return output_problem(path.resolve().parent) if is_regular_file(path) else None  # a device or a pipe
    return output_problem(path, ending=f".{'0' * 32}.tmp")


def refuse_output_inside(output: Path, folder: Path) -> None:
    """Raise `UserError` if an output is inside an input: deleting that checkpoint would delete the output with it."""
    if output.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{output}: is inside {folder}, which is an input; choose another output")


def _limit(folder: Path, name: str, default: int) -> int:
    try:
        return os.pathconf(folder, name)
    except OSError:  # not every file system says it
        return default
