"""Run directories of all formats; see tests/fixtures/make_run_directories.py."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "fixtures" / "formats"


def unpack(name: str, folder: Path) -> Path:
    """Unpack a run directory into `folder`, its data beside it, and return it."""
    with tarfile.open(FOLDER / f"{name}.tar.xz") as packed:
        packed.extractall(folder, filter="data")
    (folder / "data").mkdir(exist_ok=True)
    for suffix in (".bin", ".idx"):
        shutil.copy(FOLDER / f"web{suffix}", folder / "data")
    return folder / "run"
