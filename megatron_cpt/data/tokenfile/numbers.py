"""Table of numbers in a file, read a page at a time instead of through a memory map.

Through a memory map, a failing disk or a file that was cut kills the process with SIGBUS; a read raises an error.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.header import refuse
from megatron_cpt.files.remote import open_ranges

_PAGE_ENTRIES = 1 << 10
_MOST_PAGES = 1 << 11  # of 8 KiB: at most 16 MiB per table


class NumberTable:
    """Sequence of `count` numbers from a byte of a file on; slices are arrays.

    Single numbers are read with their page, which is kept, because a binary search asks for the same ones again.
    """

    def __init__(self, path: str, dtype: npt.DTypeLike, offset: int, count: int) -> None:
        self._path, self._dtype, self._offset, self._count = path, np.dtype(dtype), offset, count
        self._pages = OrderedDict[int, npt.NDArray[Any]]()

    @classmethod
    def of(cls, path: str, dtype: npt.DTypeLike) -> NumberTable:
        """Return the table that a local file consists of."""
        return cls(path, dtype, 0, os.path.getsize(path) // np.dtype(dtype).itemsize)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            return self._read(start, max(start, stop))[::step]
        index = range(self._count)[index]
        page, within = divmod(index, _PAGE_ENTRIES)
        numbers = self._pages.get(page)
        if numbers is None:
            start = page * _PAGE_ENTRIES
            numbers = self._pages[page] = self._read(start, min(start + _PAGE_ENTRIES, self._count))
            if len(self._pages) > _MOST_PAGES:
                self._pages.popitem(last=False)
        return numbers[within]

    def tolist(self) -> list[int]:
        """Return all numbers."""
        numbers: list[int] = self[:].tolist()
        return numbers

    def _read(self, start: int, stop: int) -> npt.NDArray[Any]:
        numbers = np.empty(stop - start, self._dtype)
        if numbers.size:
            with open_ranges(self._path) as file:
                if file.read_into(numbers.data.cast("B"), self._offset + start * numbers.itemsize) < numbers.nbytes:
                    raise refuse(self._path, "was truncated since it was opened")
        return numbers
