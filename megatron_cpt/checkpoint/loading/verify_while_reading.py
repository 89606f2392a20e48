"""The checksums of shards, compared while they are loaded.

Each rank hashes its share from the first byte to the last, in threads, and its load follows: it waits for what it wants
of a file until the hashing has passed there, and then finds it in the page cache. So the disk is read once, in order,
and the time of a verified load is about that of the read.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from megatron_cpt.checkpoint.manifest import FileDigest, Verify, compare, shards_to_compare

_THREADS = 2  # that hash; one reads about as fast as a local disk gives


class ShardCheck:
    """Around a load; hashing begins at once. Leaving waits for its end."""

    def __init__(self, checkpoint: Path, how: Verify, *, part: int, parts: int) -> None:
        """Begin.

        Args:
            checkpoint: its folder.
            how: which shards to compare.
            part, parts: which of how many shares this is. Neighbors in the order of writing stay together, so that a
                rank which loads in the layout of the save hashes the files that it loads.

        Raises:
            RefusedError: there is no usable manifest.
        """
        shards = list(shards_to_compare(checkpoint, how).items())
        own = shards[part * len(shards) // parts : (part + 1) * len(shards) // parts]
        self._checkpoint = checkpoint
        self._passed: dict[str, float] = {name: 0 for name, _ in own}
        self._moved = threading.Condition()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="verify")
        self._compared = [self._threads.submit(self._compare, name, expected) for name, expected in own]

    def __enter__(self) -> ShardCheck:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """Wait for the files that are being hashed, and leave out the others where something failed."""
        self._threads.shutdown(cancel_futures=kind is not None)

    def wait_for(self, path: Path, end: int) -> None:
        """Wait until a file has been hashed up to `end` bytes; at once where it is not of this share."""
        if path.name in self._passed:
            with self._moved:
                self._moved.wait_for(lambda: self._passed[path.name] >= end)

    def faults(self) -> list[str]:
        """What is wrong with the shards of this share, one line each, once all are hashed."""
        return [fault for job in self._compared if (fault := job.result()) is not None]

    def _compare(self, name: str, expected: FileDigest) -> str | None:
        try:
            return compare(self._checkpoint, name, expected, partial(self._pass, name))
        except OSError as error:  # a bad block of the disk
            return str(error)
        finally:
            self._pass(name, math.inf)

    def _pass(self, name: str, num_bytes: float) -> None:
        with self._moved:
            self._passed[name] = num_bytes
            self._moved.notify_all()
