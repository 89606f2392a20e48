"""Files that survive a power cut, and pairs of them that are never seen half."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

Rename = tuple[str, str]


def close_durably(file: IO[bytes]) -> None:
    """Closes a file once its content is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(renames: Sequence[Rename]) -> None:
    """Renames finished files to their final names; called again after a kill, it does the rest.

    Of a data set the `.bin` comes before the `.idx`, and an older `.idx` goes before both: every reader needs the
    `.idx`, so none takes a half pair for a data set, nor the new `.bin` with the old `.idx`.

    Args:
        renames: (from, to) in order; one whose file is no longer there was made before a restart.
    """
    for source, target in renames:
        if not os.path.exists(source):
            continue
        if target.endswith(".bin"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{target[:-4]}.idx")
                sync_folder(Path(target).parent)
        os.replace(source, target)
        sync_folder(Path(target).parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new content, also after a power cut.

    Only one process may write it at a time: what a dead one left aside is overwritten by the next.
    """
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)
