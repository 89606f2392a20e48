"""Checksums of shards, compared while the shards are read.

Hashing everything first would read a checkpoint larger than memory from the disk twice. Here threads hash each shard
from its first byte to its last, and a reader follows: it waits until the hashing has passed the bytes that it wants,
and then finds them in the page cache. The disk is read once, in order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron_cpt.checkpoint.manifest import CorruptCheckpointError, FileDigest, compare
from megatron_cpt.files.retry import is_path_error

_THREADS = 2  # that hash; one reads about as fast as a local disk


class ShardVerifier:
    """Hashes shards in threads while others read them. A file that is not among `expected` is never waited for.

    A load in which every rank hashes its share of all shards, and all ranks must fail alike:

        with ShardVerifier(checkpoint, share_of(expected, rank, world_size)) as verifier:
            verifier.wait_for(shard, end)    # before reading any bytes below `end`
            faults = verifier.faults()       # exchanged by the ranks

    A conversion that hashes only the files that it reads, and must not use a byte of a damaged one:

        verifier = ShardVerifier(checkpoint, expected, on_demand=True)
        verifier.verify(shard)               # before reading any byte

    Args:
        checkpoint: its folder.
        expected: digests of the shards to compare, in the order of hashing; see `manifest.shards_to_compare`.
        on_demand: hash a shard when it is first asked for, together with the two after it, instead of all at once.
    """

    def __init__(self, checkpoint: Path, expected: Mapping[str, FileDigest], *, on_demand: bool = False) -> None:
        self._checkpoint = checkpoint
        self._expected = expected
        self._order = list(expected)
        self._num_hashed: dict[str, float] = dict.fromkeys(expected, 0)  # bytes
        self._has_advanced = threading.Condition()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="verify")
        self._jobs: dict[str, Future[str | None]] = {}
        if not on_demand:
            self._start(0, len(self._order))

    def __enter__(self) -> ShardVerifier:
        """Return the verifier itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Wait until the shards that were asked for are hashed; after an exception, only for the running ones."""
        self._threads.shutdown(cancel_futures=kind is not None)

    def wait_for(self, shard: Path, end: float = math.inf) -> None:
        """Wait until a shard has been hashed up to byte `end`, or could not be read."""
        if shard.name not in self._expected:
            return
        if shard.name not in self._jobs:
            first = self._order.index(shard.name)
            self._start(first, first + 1 + _THREADS)
        with self._has_advanced:
            self._has_advanced.wait_for(lambda: self._num_hashed[shard.name] >= end)

    def verify(self, shard: Path) -> None:
        """Wait until a shard has been hashed to its end.

        Raises:
            CorruptCheckpointError: its content is damaged, or it is missing.
            OSError: the disk failed.
        """
        self.wait_for(shard)
        if (job := self._jobs.get(shard.name)) and (fault := job.result()):
            raise CorruptCheckpointError(self._checkpoint, [fault])

    def faults(self) -> list[str]:
        """Return one line for each damaged shard, once all that were asked for are hashed.

        Raises:
            OSError: the disk failed.
        """
        return [fault for job in self._jobs.values() if (fault := job.result()) is not None]

    def _start(self, first: int, stop: int) -> None:
        with self._has_advanced:
            for name in self._order[first:stop]:
                if name not in self._jobs:
                    self._jobs[name] = self._threads.submit(self._compare, name)

    def _compare(self, name: str) -> str | None:
        try:
            return compare(self._checkpoint, name, self._expected[name], partial(self._advance, name))
        except OSError as error:
            if not is_path_error(error):
                raise
            return str(error)
        finally:
            self._advance(name, math.inf)

    def _advance(self, name: str, num_bytes: float) -> None:
        with self._has_advanced:
            self._num_hashed[name] = num_bytes
            self._has_advanced.notify_all()


def share_of(expected: Mapping[str, FileDigest], part: int, num_parts: int) -> dict[str, FileDigest]:
    """Return one of `num_parts` shares of the shards.

    Neighbors in the order of writing stay together, so a rank that loads in the layout of the save hashes the files
    that it loads. Example: 5 shards in 2 parts are shared as 2 and 3.
    """
    names = list(expected)
    return {
        name: expected[name] for name in names[part * len(names) // num_parts : (part + 1) * len(names) // num_parts]
    }
