"""Files of an unfinished cache: each record is written in its place, and verified to find those that are missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.teacher_cache.cache_header import CacheHeader, file_name
from megatron_cpt.data.teacher_cache.top_k_records import record_seeds
from megatron_cpt.files.whole_io import DiskFile, is_regular_file, read_array
from megatron_cpt.teach.window_rows import GivenRecords, WindowRows

_POSITIONS_AT_ONCE = 1 << 16


def create_files(folder: Path, header: CacheHeader) -> None:
    """Create the files that are missing, in their final size; a file system with holes gives no space to them yet."""
    for index in range(len(header.files)):
        path = folder / file_name(index)
        with DiskFile(path, "r+b" if is_regular_file(path) else "wb") as file:
            file.truncate(header.grid(index).num_positions * header.records.num_bytes)


def missing_groups(folder: Path, rows: WindowRows, file: int) -> npt.NDArray[np.int64]:
    """Return the numbers of the groups of a file that have a record which is missing or damaged."""
    header = rows.header
    grid, records, path = header.grid(file), header.records, folder / file_name(file)
    intact = np.ones(rows.num_groups(file), np.bool_)
    starts = grid.first_given(np.arange(rows.num_groups(file)) * rows.group_size)
    for first in range(0, grid.num_positions, _POSITIONS_AT_ONCE):
        count = min(_POSITIONS_AT_ONCE, grid.num_positions - first)
        found = read_array(path, records.dtype, count, first * records.num_bytes)
        good = np.zeros(count, np.bool_)
        good[: len(found)] = records.is_intact(found, record_seeds(header.key(file), first, len(found)))
        bad = first + np.flatnonzero(~good)
        intact[np.searchsorted(starts, bad, side="right") - 1] = False
    return np.flatnonzero(~intact)


def write_records(folder: Path, header: CacheHeader, given: Iterable[GivenRecords]) -> None:
    """Write records in their places."""
    for one in given:
        with DiskFile(folder / file_name(one.file), "r+b") as file:
            file.write_at(one.records.view(np.uint8), one.start * header.records.num_bytes)


def sync_files(folder: Path, header: CacheHeader) -> None:
    """Wait until everything that this machine wrote is on the disk."""
    for index in range(len(header.files)):
        with DiskFile(folder / file_name(index), "r+b") as file:
            file.sync()
