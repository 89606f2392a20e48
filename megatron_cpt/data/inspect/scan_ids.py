"""Scan of all ids in a `.bin` at memory speed: the largest id, and ids outside the vocabulary."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import RefusedError

_BLOCK_BYTES = 1 << 23  # a multiple of the page size, and large enough to make Python's overhead negligible
_MOST_THREADS = 8
# madvise(2) of Linux 5.14 and newer: map the pages, and return an error in cases where an access would raise SIGBUS
_MADV_POPULATE_READ = 22
MOST_NAMED = 5
"""Positions of invalid ids that are recorded; the others are only counted."""

_BlockScan = tuple[int, int, list[tuple[int, int]]]
"""Largest id, number of invalid ids, and (token offset, id) of the first of these."""


@dataclass(frozen=True)
class IdScan:
    """Statistics of all ids of a file.

    Attributes:
        max_id: largest id; None for an empty file.
        num_outside: number of ids that are negative or not below the vocabulary size.
        first_outside: (token offset, id) of the first of these ids.
    """

    max_id: int | None
    num_outside: int
    first_outside: tuple[tuple[int, int], ...]
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
        RefusedError: a part of the file cannot be read.
    """
    assert dtype.kind in "iu", f"{dtype} is not an integer type"
    if num_threads is None:
        num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    num_bytes = num_tokens * dtype.itemsize
    found, lock = list[_BlockScan](), threading.Lock()
    begin = time.perf_counter()
    with open(path, "rb") as file:
        blocks = _Blocks(file.fileno(), path, num_bytes)

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
    max_id = max((block_max for block_max, _, _ in found), default=None)
    first_outside = sorted(entry for _, _, first in found for entry in first)[:MOST_NAMED]
    num_outside = sum(number for _, number, _ in found)
    return IdScan(max_id, num_outside, tuple(first_outside), num_bytes, time.perf_counter() - begin)


class _Blocks:
    """Blocks of a file in a memory map, so that ids are not copied.

    Accessing an unreadable sector or a truncated file through a memory map kills the process. Therefore each block is
    first mapped with MADV_POPULATE_READ, which returns an error instead. On kernels without it, blocks are copied.
    """

    def __init__(self, fd: int, path: str, num_bytes: int) -> None:
        self._fd, self._path, self._num_bytes = fd, path, num_bytes
        self.require_size()
        self._map = mmap.mmap(fd, num_bytes, access=mmap.ACCESS_READ) if num_bytes else None

    def require_size(self) -> None:
        """Refuse a file that is shorter than expected; a memory map would show zeros in its last page."""
        if os.fstat(self._fd).st_size < self._num_bytes:
            raise self._problem(self._num_bytes, None)

    @contextmanager
    def read(self, offset: int, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
        """Yield the tokens of the block at this byte offset; they are valid only inside the `with` block."""
        assert self._map is not None
        size = min(_BLOCK_BYTES, self._num_bytes - offset)
        try:
            self._map.madvise(_MADV_POPULATE_READ, offset, size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise self._problem(offset + size, error.strerror) from error
            yield np.frombuffer(self._copy(offset, size), dtype)
            return
        yield np.frombuffer(self._map, dtype, size // dtype.itemsize, offset)
        # unmap the block again, because the page tables of terabytes take gigabytes
        self._map.madvise(mmap.MADV_DONTNEED, offset, size)

    def _copy(self, offset: int, size: int) -> bytearray:
        buffer = bytearray(size)
        unread = memoryview(buffer)
        while unread:
            try:
                num_read = os.preadv(self._fd, [unread], offset + size - len(unread))
            except OSError as error:
                raise self._problem(offset + size, error.strerror) from error
            if num_read == 0:
                raise self._problem(offset + size, None)
            unread = unread[num_read:]
        return buffer

    def _problem(self, end: int, reason: str | None) -> RefusedError:
        """Return the error for a file whose bytes up to `end` cannot be read."""
        size = os.fstat(self._fd).st_size
        if size < end:
            return RefusedError(
                f"{self._path}: byte {size}: the file ends here: it was truncated while it was read; check it again"
            )
        begin = max(0, end - 1) // _BLOCK_BYTES * _BLOCK_BYTES
        return RefusedError(f"{self._path}: bytes {begin} to {end}: cannot be read: {reason}")


def _scan_block(tokens: npt.NDArray[Any], token_offset: int, vocab_size: int | None) -> _BlockScan:
    """Scan a block. One pass suffices if all ids are valid, because negative ids are large as unsigned numbers."""
    bits, unsigned = 8 * tokens.dtype.itemsize, tokens.view(f"<u{tokens.dtype.itemsize}")
    limit = 1 << (bits - 1 if tokens.dtype.kind == "i" else bits)
    if vocab_size is not None:
        limit = min(limit, vocab_size)
    largest = int(unsigned.max())
    if largest < limit:
        return largest, 0, []
    outside = np.flatnonzero(unsigned >= np.uint64(limit))
    return int(tokens.max()), len(outside), [(token_offset + int(i), int(tokens[i])) for i in outside[:MOST_NAMED]]
