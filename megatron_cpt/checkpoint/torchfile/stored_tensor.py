"""A tensor that lies in a file."""

from __future__ import annotations

import math
import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.errors import RefusedError

_READ_BYTES = 8 << 20  # of one system call: Linux takes at most 2 GiB, and larger ones are no faster


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file.

    Attributes:
        path: the file.
        offset: of its first byte.
        shape, dtype: its form.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __setstate__(self, _: object) -> None:
        """A pickle could lead it to another file."""
        raise pickle.UnpicklingError("it wants to change where a tensor lies")

    @property
    def num_bytes(self) -> int:
        """Its length in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Some of its first dimension."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, offset=self.offset + start * row, shape=(stop - start, *self.shape[1:]))

    def select(self, index: int) -> StoredTensor:
        """One entry of its first dimension, which is dropped."""
        row = self.rows(index, index + 1)
        return replace(row, shape=self.shape[1:])

    def read_into(self, out: torch.Tensor) -> None:
        """Read all of it.

        Args:
            out: contiguous, of this shape and type.

        Raises:
            RefusedError: the file is shorter than it says.
        """
        if self.num_bytes == 0:
            return
        flat = out.as_strided((out.numel(),), (1,))  # a single element counts as contiguous whatever its stride
        data: Any = flat.view(torch.uint8).numpy()
        view = memoryview(data)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            done = 0
            while done < self.num_bytes:
                count = os.preadv(handle, [view[done : done + _READ_BYTES]], self.offset + done)
                if count == 0:
                    raise RefusedError(f"{self.path}: ends in the middle of a tensor; the file was cut: copy it again")
                done += count
        finally:
            os.close(handle)

    def read(self) -> torch.Tensor:
        """Read all of it into memory of its own."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out
