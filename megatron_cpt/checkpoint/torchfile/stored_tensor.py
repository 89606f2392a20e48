"""Tensors that are still in their file."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.errors import RefusedError
from megatron_cpt.files.whole_io import DiskFile


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file, whose first byte is at `offset`."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __setstate__(self, _: object) -> None:
        """Refuse a state: a pickle could redirect the tensor to another file."""
        raise pickle.UnpicklingError("it wants to change the place of a tensor")

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Return the rows [start, stop) of the first dimension."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, offset=self.offset + start * row, shape=(stop - start, *self.shape[1:]))

    def select(self, index: int) -> StoredTensor:
        """Return one row, without the first dimension."""
        row = self.rows(index, index + 1)
        return replace(row, shape=self.shape[1:])

    def read_into(self, out: torch.Tensor) -> None:
        """Read the tensor into memory.

        Args:
            out: contiguous memory of the same shape and dtype.

        Raises:
            RefusedError: the file ends before the tensor does.
        """
        if self.num_bytes == 0:
            return
        flat = out.as_strided((out.numel(),), (1,))  # torch calls a single element contiguous with any stride
        data: Any = flat.view(torch.uint8).numpy()
        with DiskFile(self.path) as file:
            if file.read_into_at(data, self.offset) < self.num_bytes:
                raise RefusedError(f"{self.path}: ends in the middle of a tensor; the file was cut, copy it again")

    def read(self) -> torch.Tensor:
        """Read the tensor into new memory."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out
