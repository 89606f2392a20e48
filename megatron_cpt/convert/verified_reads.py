"""The checksums of a checkpoint of ours, compared on the way: each file before anything of it is used.

Verifying everything first reads a checkpoint that is larger than memory from the disk twice. Here a file is hashed when
it is first asked for, and the files after it meanwhile: what is then read of it comes out of the page cache.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_cpt.checkpoint.manifest import CorruptCheckpointError, Verify, compare, find_faults, shards_to_compare

_THREADS = 2  # that hash; the files after the one that is asked for are as many


class FirstRead:
    """Called with a file of tensors before it is read; the small files are compared at once."""

    def __init__(self, checkpoint: Path, how: Verify) -> None:
        """Are all files there, and the small ones sound?

        Args:
            checkpoint: its folder.
            how: full: the checksum of every file that is read; sampled: of those that a sampled verification takes.

        Raises:
            RefusedError: a file is missing, of another size or damaged.
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
        """Wait until a file is known to be sound.

        Raises:
            RefusedError: it is damaged.
        """
        if path.name not in self._expected:
            return
        at = self._order.index(path.name)
        with self._lock:
            for name in self._order[at : at + 1 + _THREADS]:
                if name not in self._compared:
                    self._compared[name] = self._threads.submit(compare, self._checkpoint, name, self._expected[name])
        if fault := self._compared[path.name].result():
            raise CorruptCheckpointError(self._checkpoint, [fault])
