"""Ids from the workers of `preprocess` to the process that writes them, through memory that both see.

A pipe would copy each array four times. The memory is anonymous and no file of /dev/shm, which containers keep small.
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
    """Memory in equal slots, one for each block that is under way. It may be pickled for a process that is spawned.

    Only pages that were written to are taken from the machine.

    Args:
        count: slots.
        slot_bytes: size of each.
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
        """The bytes of a slot."""
        return self._bytes[number * self._slot_bytes : (number + 1) * self._slot_bytes]

    def close(self) -> None:
        """No other process can be given it from here on; arrays in it stay."""
        os.close(self._fd)


class Room:
    """Makes arrays in a slot as long as there is room, and elsewhere when there is not.

    Args:
        slot: where.
    """

    def __init__(self, slot: npt.NDArray[np.uint8]) -> None:
        self._slot, self._used = slot, 0

    def empty(self, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array of `count` numbers, not initialized."""
        begin, num_bytes = self._used, count * dtype.itemsize
        if begin + num_bytes > self._slot.size:
            return np.empty(count, dtype)
        self._used = -(-(begin + num_bytes) // _ALIGNMENT) * _ALIGNMENT
        return self._slot[begin : begin + num_bytes].view(dtype)

    def offset_of(self, array: npt.NDArray[Any]) -> int | None:
        """Where in the slot an array begins; None if it lies elsewhere."""
        offset = array.ctypes.data - self._slot.ctypes.data
        return offset if 0 <= offset < self._slot.size and array.size else None
