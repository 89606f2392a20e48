"""Scan of all ids in a `.bin` at memory speed: the largest id, and ids outside the vocabulary."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import RefusedError
from megatron_cpt.files.whole_io import DiskFile

_BLOCK_BYTES = 1 << 23  # a multiple of the page size, and large enough to make Python's overhead negligible
_MOST_THREADS = 8
# madvise(2) of Linux 5.14 and newer: map the pages, and return an error in cases where an access would raise SIGBUS
_MADV_POPULATE_READ = 22
MOST_NAMED = 5
"""Positions of invalid ids that are recorded; the others are only counted."""

LONG_RUN = 16_384
"""Tokens of a run of one id that is certainly found, as of a hole that a file system fills with zeros."""

_CELL = LONG_RUN // 4  # tokens
_FEW_TOKENS = 64  # a file of fewer tokens may be a single id
_Run = tuple[int, int, int]
"""Token offset, number of tokens, and id of a run."""


class _BlockScan(NamedTuple):
    """Scan of one block, with the runs that `_find_runs` returns."""

    max_id: int
    num_outside: int
    first_outside: list[tuple[int, int]]
    runs: list[_Run]


@dataclass(frozen=True)
class IdScan:
    """Statistics of all ids of a file.

    Attributes:
        max_id: largest id; None for an empty file.
        num_outside: number of ids that are negative or not below the vocabulary size.
        first_outside: (token offset, id) of the first of these ids.
        long_runs: (token offset, number of tokens, id) of each run of one id of at least `LONG_RUN` tokens; the offset
            and the number are exact to 4,096 tokens.
    """

    max_id: int | None
    num_outside: int
    first_outside: tuple[tuple[int, int], ...]
    long_runs: tuple[_Run, ...]
    num_bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """Speed in 10^9 bytes per second."""
        return self.num_bytes / 1e9 / max(self.seconds, 1e-9)


def scan_ids(
    path: str,
    dtype: np.dtype[Any],
    num_tokens: int,
    vocab_size: int | None = None,
    *,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> IdScan:
    """Scan every id of a `.bin`.

    Args:
        dtype: token type, an integer.
        num_tokens: number of tokens to scan, from the start of the file.
        vocab_size: ids must be below it; None: ids must only not be negative.
        num_threads: None: one per core, at most 8.
        progress: called with the number of bytes after each block, from any thread, one call at a time.

    Raises:
        RefusedError: the file is too short.
        OSError: a part of the file cannot be read.
    """
    assert dtype.kind in "iu", f"{dtype} is not an integer type"
    if num_threads is None:
        num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    num_bytes = num_tokens * dtype.itemsize
    found, lock = list[_BlockScan](), threading.Lock()
    begin = time.perf_counter()
    with DiskFile(path) as file:
        blocks = _Blocks(file, path, num_bytes)

        def work(number: int) -> None:
            for offset in range(number * _BLOCK_BYTES, num_bytes, num_threads * _BLOCK_BYTES):
                with blocks.read(offset, dtype) as tokens:
                    found.append(_scan_block(tokens, offset // dtype.itemsize, vocab_size))
                    with lock:
                        if progress is not None:
                            progress(tokens.nbytes)

        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, range(num_threads)))
        blocks.require_size()
    max_id = max((block.max_id for block in found), default=None)
    first_outside = sorted(entry for block in found for entry in block.first_outside)[:MOST_NAMED]
    num_outside = sum(block.num_outside for block in found)
    runs = _join_runs((run for block in found for run in block.runs), num_tokens)
    return IdScan(max_id, num_outside, tuple(first_outside), runs, num_bytes, time.perf_counter() - begin)


class _Blocks:
    """Blocks of a file in a memory map, so that ids are not copied.

    Accessing an unreadable sector or a truncated file through a memory map kills the process. Therefore each block is
    first mapped with MADV_POPULATE_READ, which returns an error instead. Then, and on kernels without it, the block is
    read.
    """

    def __init__(self, file: DiskFile, path: str, num_bytes: int) -> None:
        self._file, self._path, self._num_bytes = file, path, num_bytes
        self.require_size()
        self._map = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ) if num_bytes else None

    def require_size(self) -> None:
        """Refuse a file that is shorter than expected; a memory map would show zeros in its last page."""
        if self._file.size < self._num_bytes:
            raise self._truncated()

    @contextmanager
    def read(self, offset: int, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
        """Yield the tokens of the block at this byte offset; they are valid only inside the `with` block."""
        assert self._map is not None
        size = min(_BLOCK_BYTES, self._num_bytes - offset)
        try:
            self._map.madvise(_MADV_POPULATE_READ, offset, size)
        except OSError:  # an older kernel, or a failing disk, which a read may still get over
            yield np.frombuffer(self._copy(offset, size), dtype)
            return
        yield np.frombuffer(self._map, dtype, size // dtype.itemsize, offset)
        # unmap the block again, because the page tables of terabytes take gigabytes
        self._map.madvise(mmap.MADV_DONTNEED, offset, size)

    def _copy(self, offset: int, size: int) -> bytearray:
        buffer = bytearray(size)
        if self._file.read_into_at(buffer, offset) < size:
            raise self._truncated()
        return buffer

    def _truncated(self) -> RefusedError:
        return RefusedError(
            f"{self._path}: byte {self._file.size}: the file ends here: it was truncated while it was read; check it "
            "again"
        )


def _scan_block(tokens: npt.NDArray[Any], token_offset: int, vocab_size: int | None) -> _BlockScan:
    """Scan a block. One pass suffices if all ids are valid, because negative ids are large as unsigned numbers."""
    bits, unsigned = 8 * tokens.dtype.itemsize, tokens.view(f"<u{tokens.dtype.itemsize}")
    limit = 1 << (bits - 1 if tokens.dtype.kind == "i" else bits)
    if vocab_size is not None:
        limit = min(limit, vocab_size)
    runs = _find_runs(unsigned, token_offset)
    largest = int(unsigned.max())
    if largest < limit:
        return _BlockScan(largest, 0, [], runs)
    outside = np.flatnonzero(unsigned >= np.uint64(limit))
    first = [(token_offset + int(i), int(tokens[i])) for i in outside[:MOST_NAMED]]
    return _BlockScan(int(tokens.max()), len(outside), first, runs)


def _find_runs(tokens: npt.NDArray[Any], token_offset: int) -> list[_Run]:
    """Return cells of `_CELL` tokens that hold one id only.

    Only cells whose first token equals the first token of a neighbor are read completely, so text costs almost nothing.

    Example: with cells of 4 tokens, 5 7 7 7, 7 7 7 7, 7 7 7 7, 7 5 has two such cells.
    """
    firsts = tokens[::_CELL]
    candidates = firsts == np.append(firsts[1:], firsts[-1:])
    candidates[1:] |= candidates[:-1].copy()
    runs = []
    for cell in np.flatnonzero(candidates).tolist():
        start = cell * _CELL
        part = tokens[start : start + _CELL]
        if (part == part[0]).all():
            runs.append((token_offset + start, len(part), int(part[0])))
    return runs


def _join_runs(cells: Iterable[_Run], num_tokens: int) -> tuple[_Run, ...]:
    """Join neighbors of the same id, also over the borders of blocks, and return long runs, or a run of all tokens."""
    runs: list[_Run] = []
    for start, count, token in sorted(cells):
        if runs and runs[-1][0] + runs[-1][1] == start and runs[-1][2] == token:
            runs[-1] = (runs[-1][0], runs[-1][1] + count, token)
        else:
            runs.append((start, count, token))
    # a run of `LONG_RUN` tokens fills all of its cells but those at its two ends, which together hold less than two
    least = min(LONG_RUN - _CELL, max(num_tokens, _FEW_TOKENS))
    return tuple(run for run in runs if run[1] >= least)
