"""Comparison of a checkpoint's checksums while it is read: each file before any part of it is used.

Verifying everything first would read a checkpoint that is larger than memory from the disk twice. Here a file is hashed
when it is first requested, and the next files in the background. Later reads of a hashed file hit the page cache.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_cpt.checkpoint.manifest import CorruptCheckpointError, Verify, compare, find_faults, shards_to_compare

_THREADS = 2  # threads that hash, and number of files that are hashed ahead of the requested one


class FirstRead:
    """Callable that takes a file and returns when the file is verified."""

    def __init__(self, checkpoint: Path, how: Verify) -> None:
        """Verify that all files exist, and compare the small files.

        Args:
            checkpoint: folder of the checkpoint.
            how: share of the shards to compare; see `megatron_cpt.checkpoint.manifest`.

        Raises:
            RefusedError: a file is missing, has another size, or is corrupt.
        """
        self._checkpoint = checkpoint
        if faults := find_faults(checkpoint, how, with_shards=False):
            raise CorruptCheckpointError(checkpoint, faults)
        self._expected = shards_to_compare(checkpoint, how)
        self._order = list(self._expected)
        self._compared: dict[str, Future[str | None]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="verify")

    def __call__(self, path: Path) -> None:
        """Wait until a file is verified; may be called from several threads.

        Raises:
            RefusedError: the file is corrupt.
        """
        if path.name not in self._expected:
            return
        position = self._order.index(path.name)
        with self._lock:
            for name in self._order[position : position + 1 + _THREADS]:
                if name not in self._compared:
                    self._compared[name] = self._threads.submit(compare, self._checkpoint, name, self._expected[name])
        if fault := self._compared[path.name].result():
            raise CorruptCheckpointError(self._checkpoint, [fault])
