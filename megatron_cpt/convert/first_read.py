"""The checksums of a checkpoint of ours, compared on the way: each file before anything of it is used.

Verifying everything first reads a checkpoint that is larger than memory from the disk twice. Here a file is hashed when
it is first asked for, and the files after it meanwhile: what is then read of it comes out of the page cache.
"""

from __future__ import annotations

import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_cpt.checkpoint.manifest import FileDigest, Verify, digest, find_faults, read_manifest, sample
from megatron_cpt.errors import RefusedError

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
        files = read_manifest(checkpoint)
        chosen = set(files) if how == "full" else sample(checkpoint, files)
        large = {name for name in files if name.endswith(".distcp")}
        faults = find_faults(checkpoint, how="none")
        faults = faults or [fault for name in sorted(chosen - large) for fault in self._compare(name, files[name])]
        if faults:
            raise RefusedError(_refusal(checkpoint, faults))
        self._expected = {name: files[name] for name in sorted(chosen & large, key=_place)}
        self._order = list(self._expected)
        self._compared: dict[str, Future[list[str]]] = {}
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
                    self._compared[name] = self._threads.submit(self._compare, name, self._expected[name])
        if faults := self._compared[path.name].result():
            raise RefusedError(_refusal(self._checkpoint, faults))

    def _compare(self, name: str, expected: FileDigest) -> list[str]:
        if digest(self._checkpoint / name).checksum == expected.checksum:
            return []
        return [f"{name}: checksum differs: the content is damaged"]


def _place(name: str) -> list[int]:
    """Where a file stands in the order of writing: __2_10.distcp comes after __2_9.distcp."""
    return [int(number) for number in re.findall(r"\d+", name)]


def _refusal(checkpoint: Path, faults: list[str]) -> str:
    return f"{checkpoint}: broken: {'; '.join(faults)}; use another checkpoint"
