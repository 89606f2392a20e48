"""Cache on a node's local disk for token files in an object store or on a shared file system.

A file is cached in blocks; a table next to them has a checksum per block. The first process of the node that needs a
block fetches it. A block with a wrong checksum (after a power failure or disk error) is fetched again. Cache files are
named by the dataset's fingerprint, so a changed dataset never gets old blocks.

Blocks are never evicted. Samples come in random order, each once per epoch, so every block is equally likely to be
needed next, and a full cache can do no better than to keep its blocks.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import UserError
from megatron_cpt.files.identity import FileIdentity
from megatron_cpt.files.remote import open_ranges
from megatron_cpt.files.whole_io import DiskFile

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 14  # a sample of 4,096 int32 tokens spans two blocks
FETCHES = 16  # concurrent requests
_LEAST_FREE = 0.1  # share of the disk; with less free space no more blocks are cached
_NOT_CACHED = 0  # entry of the checksum table
_pool = ThreadPoolExecutor(FETCHES, "data-cache")  # prefetches blocks of all files; its threads start at the first use


def keep_on_disk(datasets: Sequence[IndexedDataset], folder: str) -> None:
    """Make datasets read their tokens through a cache in a local folder, which all processes of a node may share.

    Raises:
        UserError: the folder is not writable.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache {folder}: cannot be written: {error.strerror}; choose a local folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cache {folder}: cannot be written; change its permissions or choose another folder")
    for dataset in datasets:
        for pair in dataset.parts:
            pair.tokens_file = CachedFile(pair, folder)


class CachedFile:
    """`RangeFile` of a dataset's `.bin` that fetches each block once.

    It accesses no file before the first read and keeps no descriptor open, because there may be thousands of files.
    """

    def __init__(self, dataset: IndexedDataset, folder: str) -> None:
        self._dataset, self._path, self._folder = dataset, f"{dataset.prefix}.bin", folder
        self._end = dataset.num_tokens * dataset.dtype.itemsize
        self._pending: dict[int, Future[dict[int, bytes]]] = {}
        self._lock = threading.Lock()
        self._has_space = True

    @property
    def size(self) -> int:
        """Current size of the original file in bytes."""
        with open_ranges(self._path) as origin:
            return origin.size

    @functools.cached_property
    def _stem(self) -> str:
        return os.path.join(self._folder, fingerprint([self._dataset], with_times=True))

    @functools.cached_property
    def _sums(self) -> npt.NDArray[np.uint32]:
        """Checksum per cached block, (num_blocks,)."""
        num_blocks = -(-self._end // BLOCK_BYTES)
        with DiskFile(f"{self._stem}.sums", "ab") as table:
            table.truncate(4 * num_blocks)  # fills a new table with zeros: no block is cached
        return np.memmap(f"{self._stem}.sums", "<u4", "r+", shape=(num_blocks,))

    def read(self, offset: int, count: int) -> bytes:
        """See `RangeFile.read`."""
        buffer = bytearray(max(0, min(count, self._end - offset)))
        return bytes(buffer[: self.read_into(memoryview(buffer), offset)])

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """See `RangeFile.read_into`."""
        count = min(len(buffer), self._end - offset)
        if count <= 0:
            return 0
        numbers = _blocks(offset, count)
        blocks = self._take_prefetched(numbers)
        for number in numbers:
            if number not in blocks and (cached := self._read_cached(number)) is not None:
                blocks[number] = cached
        blocks |= self._fetch([number for number in numbers if number not in blocks])
        data = b"".join(blocks[number] for number in numbers)
        start = offset - numbers[0] * BLOCK_BYTES
        part = data[start : start + count]
        buffer[: len(part)] = part
        return len(part)

    def will_read(self, offset: int, count: int) -> None:
        """Start to fetch the blocks of a range that are not cached."""
        with self._lock:
            numbers = [
                number
                for number in _blocks(offset, min(count, self._end - offset))
                if self._sums[number] == _NOT_CACHED and number not in self._pending
            ]
            if numbers:
                future = _pool.submit(self._fetch, numbers)
                self._pending |= dict.fromkeys(numbers, future)

    def identity(self) -> FileIdentity | None:
        """Return None: the blocks may be of different times, so each fetch compares the original file."""
        return None

    def check(self, identity: FileIdentity | None) -> None:
        """Do nothing; see `identity`."""

    def __enter__(self) -> CachedFile:
        return self

    def __exit__(self, *error: object) -> None: ...

    def _take_prefetched(self, numbers: Sequence[int]) -> dict[int, bytes]:
        """Wait for and return the blocks that `will_read` has requested."""
        with self._lock:
            futures = {future for number in numbers if (future := self._pending.get(number)) is not None}
        blocks: dict[int, bytes] = {}
        for future in futures:
            fetched = future.result()
            blocks |= fetched
            with self._lock:
                for number in fetched:
                    self._pending.pop(number, None)
        return {number: blocks[number] for number in numbers if number in blocks}

    def _read_cached(self, number: int) -> bytes | None:
        expected = int(self._sums[number])
        if expected == _NOT_CACHED:
            return None
        with open_ranges(f"{self._stem}.blocks") as cache:
            data = cache.read(number * BLOCK_BYTES, BLOCK_BYTES)
        return data if _checksum(data) == expected else None

    def _fetch(self, numbers: Sequence[int]) -> dict[int, bytes]:
        """Read all blocks from the first to the last number with one request, and cache them."""
        if not numbers:
            return {}
        first, last = numbers[0], numbers[-1]
        start = first * BLOCK_BYTES
        data = bytearray(min((last + 1) * BLOCK_BYTES, self._end) - start)
        with open_ranges(self._path) as origin:
            origin.check(self._dataset.header.identities[0])
            done = origin.read_into(memoryview(data), start)
        is_complete = done == len(data)
        del data[done:]  # the file was truncated since it was opened: the reader of the dataset reports it
        blocks = {n: bytes(data[(n - first) * BLOCK_BYTES :][:BLOCK_BYTES]) for n in range(first, last + 1)}
        for number, block in blocks.items() if is_complete else ():
            self._store(number, block)
        return blocks

    def _store(self, number: int, block: bytes) -> None:
        if not self._has_space or self._sums[number] == _checksum(block):
            return
        disk = os.statvfs(self._folder)
        if disk.f_bavail < _LEAST_FREE * disk.f_blocks:
            self._has_space = False
            _warn_of_full_disk(self._folder)
            return
        with DiskFile(f"{self._stem}.blocks", "r+b", flags=os.O_CREAT) as cache:
            cache.write_at(block, number * BLOCK_BYTES)
        self._sums[number] = _checksum(block)  # last, because other processes read the block once its checksum is there


@functools.cache
def _warn_of_full_disk(folder: str) -> None:
    logger.warning(
        "%s: less than %d %% of the disk is free: the cache takes no more data, which is read where it lies",
        folder,
        round(100 * _LEAST_FREE),
    )


def _blocks(offset: int, count: int) -> range:
    return range(offset // BLOCK_BYTES, -(-(offset + count) // BLOCK_BYTES))


def _checksum(block: bytes) -> int:
    return zlib.crc32(block) or 1  # 0 means that the block is not cached
