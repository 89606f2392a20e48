"""Files that survive a power cut, and pairs of files of which no reader ever sees only one."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from megatron_cpt.files.retry import name_file_in_errors, retry_disk
from megatron_cpt.files.whole_io import DiskFile, exists, is_regular_file

Rename = tuple[str, str]


def write_atomically(path: Path, content: str | bytes, *, has_several_writers: bool = False) -> None:
    """Replace a small file: every reader sees the old content or the new one, also after a kill or a power cut.

    Args:
        content: the new content; text is written as UTF-8.
        has_several_writers: several processes may write `path` at the same time, so each one needs a temporary file of
            its own. With one writer the temporary file is always `.NAME.tmp`, and the next write replaces the one that
            a killed process has left.
    """
    temporary = path.with_name(f".{path.name}{f'.{uuid.uuid4().hex}' if has_several_writers else ''}.tmp")
    data = content.encode() if isinstance(content, str) else content

    def write() -> None:
        with DiskFile(temporary, "wb") as file:
            file.write(data)
            file.sync()
        os.replace(temporary, path)
        sync_folder(path.parent)

    try:
        retry_disk(path, write)  # unlike a single fsync it can be repeated, because it writes everything again
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_output(path: Path, content: str | bytes, *, has_several_writers: bool = False) -> None:
    """Write a small file that the user named: behind a link, and also a device or a pipe such as /dev/stdout.

    Args:
        content, has_several_writers: as in `write_atomically`.
    """
    if exists(path) and not is_regular_file(path):
        with open(path, "wb") as file:  # nothing to replace, and no disk
            file.write(content.encode() if isinstance(content, str) else content)
        return
    write_atomically(Path(os.path.realpath(path)), content, has_several_writers=has_several_writers)


def close_durably(file: IO[bytes]) -> None:
    """Close a file once its content is on the disk."""
    with name_file_in_errors(file.name), file:
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = retry_disk(folder, lambda: os.open(folder, os.O_RDONLY))
    try:
        with name_file_in_errors(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


def publish(renames: Sequence[Rename]) -> None:
    """Rename finished files to their final names; a second call after a kill makes the remaining renames.

    The `.bin` of a dataset comes before its `.idx`, and an older `.idx` is removed before both. Every reader opens the
    `.idx` first, so no reader takes a `.bin` alone for a dataset, or the new `.bin` with the old `.idx`.

    Args:
        renames: (from, to) in order. A source that no longer exists was renamed before the kill.
    """
    for source, target in renames:
        if not exists(source):
            continue
        if target.endswith(".bin"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{target[:-4]}.idx")
                sync_folder(Path(target).parent)
        _rename(source, target)
        sync_folder(Path(target).parent)


def publish_or_remove(renames: Sequence[Rename]) -> None:
    """Publish files that the next call writes again: after an error none of them has its final name."""
    present = [(source, target) for source, target in renames if exists(source)]
    try:
        publish(present)
    except OSError:
        for source, target in present:
            with contextlib.suppress(OSError):  # the first error is the one to report
                if not exists(source):
                    os.unlink(target)
        raise


def _rename(source: str, target: str) -> None:
    """Rename a file; a network file system may report a failure although the file has its new name."""

    def rename() -> None:
        try:
            os.replace(source, target)
        except FileNotFoundError:
            if not exists(target):
                raise

    retry_disk(target, rename)
