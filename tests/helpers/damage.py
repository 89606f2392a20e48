"""Damage to files: cut at any byte, any bit flipped, removed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def cut(path: Path, place: int) -> None:
    """Leave only the first bytes."""
    os.truncate(path, place)


def flip(path: Path, place: int) -> None:
    """Flip one bit of the byte at a place."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << place % 8
    path.write_bytes(data)


def remove(path: Path, place: int) -> None:
    """Remove the file."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path, int], None]] = {"cut": cut, "flip": flip, "remove": remove}


def harm(path: Path, data: st.DataObject) -> None:
    """Draw a kind of damage and a place, and apply it; an empty file can only be removed."""
    size = path.stat().st_size
    kind = data.draw(st.sampled_from(sorted(DAMAGES) if size else ["remove"]), label=str(path.name))
    DAMAGES[kind](path, data.draw(st.integers(0, max(0, size - 1)), label="place"))


def files_below(folder: Path) -> list[Path]:
    """Return all files of a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def draw_examples(check: Callable[[st.DataObject], None], count: int) -> None:
    """Call a check with so many draws of random data."""

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(data)

    run()
