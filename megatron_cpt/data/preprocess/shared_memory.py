"""Memory through which workers send token ids to the process that writes them.

A pipe would copy each array four times. The memory is anonymous, not a file in /dev/shm, which containers keep small.
"""

from __future__ import annotations

import mmap
import os
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 8


class SharedSlots:
    """Shared memory in `count` slots of `slot_bytes` each, one slot per block in flight.

    It can be pickled for a spawned process. Only pages that were written take up memory of the machine.
    """

    def __init__(self, count: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._fd = os.memfd_create("tokens")
        os.ftruncate(self._fd, count * slot_bytes)
        self._bytes = np.frombuffer(mmap.mmap(self._fd, 0), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {"fd": reduction.DupFd(self._fd), "slot_bytes": self._slot_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._slot_bytes = state["slot_bytes"]
        self._fd = state["fd"].detach()
        self._bytes = np.frombuffer(mmap.mmap(self._fd, 0), np.uint8)

    def slot(self, number: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of a slot."""
        return self._bytes[number * self._slot_bytes : (number + 1) * self._slot_bytes]

    def close(self) -> None:
        """Close the descriptor: no further process can be given the memory; existing arrays stay valid."""
        os.close(self._fd)


class SlotAllocator:
    """Allocator of arrays inside a slot, and in ordinary memory once the slot is full."""

    def __init__(self, slot: npt.NDArray[np.uint8]) -> None:
        self._slot, self._used = slot, 0

    def empty(self, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an uninitialized array of `count` numbers."""
        begin, num_bytes = self._used, count * dtype.itemsize
        if begin + num_bytes > self._slot.size:
            return np.empty(count, dtype)
        self._used = -(-(begin + num_bytes) // _ALIGNMENT) * _ALIGNMENT
        return self._slot[begin : begin + num_bytes].view(dtype)

    def offset_of(self, array: npt.NDArray[Any]) -> int | None:
        """Return the byte of the slot where an array begins; None if it lies outside the slot."""
        offset = array.ctypes.data - self._slot.ctypes.data
        return offset if 0 <= offset < self._slot.size and array.size else None
