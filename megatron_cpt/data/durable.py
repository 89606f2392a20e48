"""Files that survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO


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
