"""All ids of a `.bin` at the speed of memory: the largest one, and those outside of the vocabulary."""

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

_BLOCK_BYTES = 1 << 23  # whole pages, and enough of them for Python's share of the time to vanish
_MOST_THREADS = 8
# madvise(2), Linux 5.14 and newer: map pages in, and answer with an error where a plain access would raise SIGBUS
_MADV_POPULATE_READ = 22
MOST_NAMED = 5
"""Places that are remembered."""


@dataclass(frozen=True)
class IdScan:
    """What all ids of a file are like.

    Attributes:
        max_id: the largest; None of an empty file.
        num_outside: how many are negative or not below the vocabulary's size.
        first_outside: (token offset, id) of the first of them.
        num_bytes: bytes read.
        seconds: time it took.
    """

    max_id: int | None
    num_outside: int
    first_outside: tuple[tuple[int, int], ...]
    num_bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """Speed, in 10^9 bytes a second."""
        return self.num_bytes / 1e9 / max(self.seconds, 1e-9)


class _Tally:
    """What the threads have found so far."""

    def __init__(self) -> None:
        self.max_id: int | None = None
        self.num_outside = 0
        self.first_outside: list[tuple[int, int]] = []

    def add(self, other: _Tally) -> None:
        if other.max_id is not None:
            self.max_id = other.max_id if self.max_id is None else max(self.max_id, other.max_id)
        self.num_outside += other.num_outside
        self.first_outside = sorted([*self.first_outside, *other.first_outside])[:MOST_NAMED]


def scan_ids(
    path: str,
    dtype: np.dtype[Any],
    num_tokens: int,
    vocab_size: int | None = None,
    *,
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> IdScan:
    """Look at every id of a file.

    Args:
        path: the `.bin`.
        dtype: its token type, an integer.
        num_tokens: tokens to look at, from its start.
        vocab_size: ids must be below it; None: they only must not be negative.
        num_threads: left out: one a core, at most 8.
        progress: called with the bytes of each block that is done, from any thread, one call at a time.

    Raises:
        RefusedError: a part of the file cannot be read.
    """
    assert dtype.kind in "iu", f"{dtype} is no type of an id"
    if num_threads is None:
        num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    num_bytes = num_tokens * dtype.itemsize
    total, lock = _Tally(), threading.Lock()
    begin = time.perf_counter()
    with open(path, "rb") as file:
        blocks = _Blocks(file.fileno(), path, num_bytes)

        def work(number: int) -> None:
            for offset in range(number * _BLOCK_BYTES, num_bytes, num_threads * _BLOCK_BYTES):
                with blocks.read(offset, dtype) as tokens:
                    found = _look(tokens, offset // dtype.itemsize, vocab_size)
                    with lock:
                        total.add(found)
                        if progress is not None:
                            progress(tokens.nbytes)

        if num_threads == 1:
            work(0)
        else:
            with ThreadPoolExecutor(num_threads) as pool:
                list(pool.map(work, range(num_threads)))
        blocks.require_whole()
    seconds = time.perf_counter() - begin
    return IdScan(total.max_id, total.num_outside, tuple(total.first_outside), num_bytes, seconds)


class _Blocks:
    """A file a block at a time, out of a memory map: the ids are not copied.

    A sector that cannot be read, or a file that is cut meanwhile, kills a process that meets it in a memory map. So the
    kernel is asked to map each block first, and says if it cannot; one that is too old for that copies the block.
    """

    def __init__(self, fd: int, path: str, num_bytes: int) -> None:
        self._fd, self._path, self._num_bytes = fd, path, num_bytes
        self.require_whole()
        self._map = mmap.mmap(fd, num_bytes, access=mmap.ACCESS_READ) if num_bytes else None

    def require_whole(self) -> None:
        """Refuse a file that is shorter than it should be: in its last page a map shows zeros."""
        if os.fstat(self._fd).st_size < self._num_bytes:
            raise self._problem(self._num_bytes, None)

    @contextmanager
    def read(self, offset: int, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
        """The tokens of the block that begins at this byte; they are gone afterwards."""
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
        # what was looked at may leave the address space: the page tables of terabytes are gigabytes
        self._map.madvise(mmap.MADV_DONTNEED, offset, size)

    def _copy(self, offset: int, size: int) -> bytearray:
        buffer = bytearray(size)
        rest = memoryview(buffer)
        while rest:
            try:
                num_read = os.preadv(self._fd, [rest], offset + size - len(rest))
            except OSError as error:
                raise self._problem(offset + size, error.strerror) from error
            if num_read == 0:
                raise self._problem(offset + size, None)
            rest = rest[num_read:]
        return buffer

    def _problem(self, end: int, reason: str | None) -> RefusedError:
        """Why the bytes up to `end` could not be had."""
        size = os.fstat(self._fd).st_size
        if size < end:
            return RefusedError(f"{self._path}: byte {size}: the file ends here now: it was cut while it was read")
        begin = max(0, end - 1) // _BLOCK_BYTES * _BLOCK_BYTES
        return RefusedError(f"{self._path}: bytes {begin} to {end}: cannot be read: {reason}")


def _look(tokens: npt.NDArray[Any], token_offset: int, vocab_size: int | None) -> _Tally:
    """One pass where all is well: seen as unsigned numbers, negative ids are larger than any vocabulary."""
    tally, bits = _Tally(), 8 * tokens.dtype.itemsize
    limit = 1 << (bits - 1 if tokens.dtype.kind == "i" else bits)
    if vocab_size is not None:
        limit = min(limit, vocab_size)
    largest = int(tokens.view(f"<u{tokens.dtype.itemsize}").max())
    if largest < limit:
        tally.max_id = largest
        return tally
    tally.max_id = int(tokens.max())
    outside = np.flatnonzero(tokens.view(f"<u{tokens.dtype.itemsize}") >= np.uint64(limit))
    tally.num_outside = len(outside)
    tally.first_outside = [(token_offset + int(place), int(tokens[place])) for place in outside[:MOST_NAMED]]
    return tally
