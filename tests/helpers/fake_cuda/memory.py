"""Bytes of the storages that live on the fake device, as the caching allocator would hand them out."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

_ALIGNMENT = 512  # kMinBlockSize of c10/cuda/CUDACachingAllocator.h


class DeviceMemory:
    """Current and peak bytes of all storages on the fake device.

    A view counts as its storage, once. Fragmentation, the CUDA context and communication buffers are not counted.

    Attributes:
        now, peak: bytes; `reset_peak` starts a new peak.
        at_peak: bytes at the peak by the operator that created them, if `explains`.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.explains = False
        self.at_peak: Counter[str] = Counter()
        self._live: dict[int, tuple[int, str]] = {}
        self._hidden = 0

    def forget(self) -> None:
        """Count nothing of what exists now, such as a model of an earlier case that something still refers to."""
        self._live.clear()
        self.now = self.peak = 0

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now
        self._explain()

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Do not count what is created inside: temporaries that a fused kernel keeps in registers."""
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1

    def add(self, value: Any, origin: str) -> None:
        """Count the storages of all tensors in `value` that are not counted yet."""
        if self._hidden:
            return
        for leaf in tree_leaves(value):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda":
                self._add(leaf.untyped_storage(), origin)

    def add_workspace(self, size: int) -> None:
        """Count bytes that a kernel allocates and frees."""
        if not self._hidden and self.now + size > self.peak:
            self.peak = self.now + size
            self._explain()
            self.at_peak["workspace"] += size

    def _add(self, storage: torch.UntypedStorage, origin: str) -> None:
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        self._live[key] = (size, origin)
        weakref.finalize(storage, self._remove, key, self._live[key])
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self._explain()

    def _remove(self, key: int, entry: tuple[int, str]) -> None:
        if self._live.get(key) is entry:
            self.now -= self._live.pop(key)[0]

    def _explain(self) -> None:
        if self.explains:
            self.at_peak = Counter()
            for size, origin in self._live.values():
                self.at_peak[origin] += size
