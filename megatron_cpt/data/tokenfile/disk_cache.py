"""A node's own disk as a cache of token files that lie in an object store or on a shared file system.

A file is kept in blocks, each with a checksum in a table beside it. A block is fetched when a sample needs it first, by
whichever process of the node that is; a block whose checksum is wrong (a power cut, a failing disk) is fetched again.
What is kept for one content of a file is never used for another: the name is its fingerprint.

Nothing is ever thrown out to make room. Samples come in a random order, each once an epoch, so of two blocks none is
more likely to be wanted soon, and the best that a full cache can do is to keep what it has.
"""

from __future__ import annotations

import functools
import os
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import UserError
from megatron_cpt.files.remote import open_ranges

BLOCK_BYTES = 1 << 14  # a sample of 4,096 int32 tokens lies in two
FETCHES = 16  # requests under way at a time
_LEAST_FREE = 0.1  # of the disk: from there on nothing more is kept
_ABSENT = 0


def keep_on_disk(datasets: Sequence[IndexedDataset], folder: str) -> None:
    """Lets data sets read their tokens through a cache in a folder of this node; all its processes may share it.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache {folder}: cannot be written: {error.strerror}; choose a local folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cache {folder}: cannot be written; change its permissions or choose another folder")
    for dataset in datasets:
        dataset.tokens_file = CachedFile(dataset, folder)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads that fetch what is announced, one set for all files."""
    return ThreadPoolExecutor(FETCHES, "data-cache")


class CachedFile:
    """The `.bin` of a data set as a `RangeFile` that fetches each block once.

    Nothing is looked up before the first read, and no descriptor stays open: there may be thousands of files.

    Args:
        dataset: whose tokens these are.
        folder: where blocks are kept.
    """

    def __init__(self, dataset: IndexedDataset, folder: str) -> None:
        self._dataset, self._path, self._folder = dataset, f"{dataset.prefix}.bin", folder
        self._end = dataset.num_tokens * dataset.dtype.itemsize
        self._under_way: dict[int, Future[dict[int, bytes]]] = {}
        self._lock = threading.Lock()
        self._may_keep = True

    @property
    def size(self) -> int:
        """Bytes of the file itself, now."""
        with open_ranges(self._path) as origin:
            return origin.size

    @functools.cached_property
    def _stem(self) -> str:
        return os.path.join(self._folder, fingerprint([self._dataset]))

    @functools.cached_property
    def _sums(self) -> npt.NDArray[np.uint32]:
        """A checksum for each block that is kept, (num_blocks,)."""
        num_blocks = -(-self._end // BLOCK_BYTES)
        with open(f"{self._stem}.sums", "ab") as table:
            table.truncate(4 * num_blocks)  # zeros where nothing was written
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
        blocks = self._arrived(numbers)
        for number in numbers:
            if number not in blocks and (kept := self._kept(number)) is not None:
                blocks[number] = kept
        blocks |= self._fetch([number for number in numbers if number not in blocks])
        data = b"".join(blocks[number] for number in numbers)
        begin = offset - numbers[0] * BLOCK_BYTES
        part = data[begin : begin + count]
        buffer[: len(part)] = part
        return len(part)

    def will_read(self, offset: int, count: int) -> None:
        """Begins to fetch what is not kept, several ranges at a time."""
        with self._lock:
            numbers = [
                number
                for number in _blocks(offset, min(count, self._end - offset))
                if self._sums[number] == _ABSENT and number not in self._under_way
            ]
            if numbers:
                future = _pool().submit(self._fetch, numbers)
                self._under_way |= dict.fromkeys(numbers, future)

    def __enter__(self) -> CachedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def _arrived(self, numbers: Sequence[int]) -> dict[int, bytes]:
        """What `will_read` asked for; waits for it."""
        with self._lock:
            futures = {future for number in numbers if (future := self._under_way.get(number)) is not None}
        blocks: dict[int, bytes] = {}
        for future in futures:
            fetched = future.result()
            blocks |= fetched
            with self._lock:
                for number in fetched:
                    self._under_way.pop(number, None)
        return {number: blocks[number] for number in numbers if number in blocks}

    def _kept(self, number: int) -> bytes | None:
        expected = int(self._sums[number])
        if expected == _ABSENT:
            return None
        with open_ranges(f"{self._stem}.blocks") as kept:
            data = kept.read(number * BLOCK_BYTES, BLOCK_BYTES)
        return data if _checksum(data) == expected else None

    def _fetch(self, numbers: Sequence[int]) -> dict[int, bytes]:
        """Reads blocks, from the first to the last of these, with one request."""
        if not numbers:
            return {}
        first, last = numbers[0], numbers[-1]
        begin = first * BLOCK_BYTES
        data = bytearray(min((last + 1) * BLOCK_BYTES, self._end) - begin)
        with open_ranges(self._path) as origin:
            done = 0
            while done < len(data) and (num_read := origin.read_into(memoryview(data)[done:], begin + done)):
                done += num_read
        whole = done == len(data)
        del data[done:]  # of a file that was cut since it was opened: whoever reads sees the end, and says so
        blocks = {n: bytes(data[(n - first) * BLOCK_BYTES :][:BLOCK_BYTES]) for n in range(first, last + 1)}
        for number, block in blocks.items() if whole else ():
            self._keep(number, block)
        return blocks

    def _keep(self, number: int, block: bytes) -> None:
        if not self._may_keep or self._sums[number] == _checksum(block):
            return
        disk = os.statvfs(self._folder)
        if disk.f_bavail < _LEAST_FREE * disk.f_blocks:
            self._may_keep = False
            return
        fd = os.open(f"{self._stem}.blocks", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(fd, block, number * BLOCK_BYTES)
        finally:
            os.close(fd)
        self._sums[number] = _checksum(block)  # only now: until it is there, nobody looks at the block


def _blocks(offset: int, count: int) -> range:
    return range(offset // BLOCK_BYTES, -(-(offset + count) // BLOCK_BYTES))


def _checksum(block: bytes) -> int:
    return zlib.crc32(block) or 1  # 0 stands for a block that is not there
