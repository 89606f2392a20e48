"""megatron's `.bin`/`.idx` token files: reading them, and finding them by prefix or glob.

The `.bin` is read with `pread` and not through a memory map: a read releases the interpreter lock (the prefetching
thread never stalls a training step on a page fault), a failing disk or a file cut underneath is an exception and not
a SIGBUS, and no descriptor stays open, so ten thousand files fit under the usual limit of 1,024. The tables of the
`.idx` are memory maps, made when first asked for: training never looks at them.
"""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.header import IndexHeader, best_dtype, read_header, refuse
from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter
from megatron_cpt.errors import UserError
from megatron_cpt.files.remote import RangeFile, find, is_file, is_remote, open_ranges

__all__ = [
    "IndexHeader",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "best_dtype",
    "expand_prefixes",
    "read_header",
]


class IndexedDataset:
    """A PREFIX.bin/PREFIX.idx pair. Opening it costs one header read, whatever its size.

    Args:
        prefix: path without `.bin` or `.idx`.

    Attributes:
        tokens_file: what the tokens are read through (see `cache.py`); None: the `.bin` itself, opened for each read.

    Raises:
        UserError: a file is missing.
        RefusedError: the files are damaged or no pair (see `read_header`).
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.header = read_header(prefix)
        self.prefix = self.header.prefix
        self.dtype = self.header.dtype
        self.num_tokens = self.header.num_tokens
        self.num_documents = self.header.num_documents
        self.num_sequences = self.header.num_sequences
        self.tokens_file: RangeFile | None = None

    def __repr__(self) -> str:
        return f"IndexedDataset({self.prefix!r}: {self.num_documents} documents, {self.num_tokens} {self.dtype} tokens)"

    @cached_property
    def sizes(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence, (num_sequences,)."""
        return self._table("<i4", self.header.sizes_offset, self.num_sequences)

    @cached_property
    def sequence_pointers(self) -> npt.NDArray[np.int64]:
        """Where each sequence begins in the `.bin`, in bytes, (num_sequences,)."""
        return self._table("<i8", self.header.pointers_offset, self.num_sequences)

    @cached_property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """The sequence each document begins with, and num_sequences at the end, (num_documents + 1,)."""
        return self._table("<i8", self.header.documents_offset, self.num_documents + 1)

    def read(self, start: int, count: int) -> npt.NDArray[Any]:
        """Tokens [start, start + count) of the `.bin`, whatever documents they belong to.

        Raises:
            IndexError: the range is not inside the file.
            RefusedError: the file became shorter since it was opened.
        """
        self._check_range(start, count)
        tokens = np.empty(count, self.dtype)
        self.read_rows([start], [tokens])
        return tokens

    def read_rows(self, starts: Sequence[int], rows: Sequence[npt.NDArray[Any]]) -> None:
        """Fill each row with the tokens of the `.bin` from its start on; the file is opened once.

        Args:
            starts: offsets of the first tokens.
            rows: contiguous, of the file's type.

        Raises:
            IndexError: a range is not inside the file.
            RefusedError: the file became shorter since it was opened.
        """
        for start, row in zip(starts, rows, strict=True):
            self._check_range(start, row.size)
        if not any(row.size for row in rows):
            return
        itemsize = self.dtype.itemsize
        with self._open_tokens() as file:
            for start, row in zip(starts, rows, strict=True):
                rest, offset = row.data.cast("B"), start * itemsize
                while rest:  # one call reads at most 2 GiB, and may be interrupted
                    num_read = file.read_into(rest, offset)
                    if num_read == 0:
                        was = self.num_tokens * itemsize
                        raise refuse(
                            f"{self.prefix}.bin", f"was cut from {was} to {file.size} bytes since it was opened"
                        )
                    rest, offset = rest[num_read:], offset + num_read

    def will_read(self, starts: Sequence[int], count: int) -> None:
        """Says that so many tokens from each of these on are read soon: the disk can fetch many samples at a time."""
        itemsize = self.dtype.itemsize
        with self._open_tokens() as file:
            for start in starts:
                file.will_read(start * itemsize, count * itemsize)

    def document(self, index: int) -> npt.NDArray[Any]:
        """All tokens of one document.

        Raises:
            IndexError: there is no such document.
        """
        start = self.document_start(index)
        end = self.num_tokens if index == self.num_documents - 1 else self.document_start(index + 1)
        return self.read(start, end - start)

    def document_start(self, index: int) -> int:
        """Offset of a document's first token in the `.bin`, in tokens.

        Raises:
            IndexError: there is no such document.
            RefusedError: the index leads outside of the data.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: document {index} of {self.num_documents}")
        sequence = int(self.document_indices[index])
        if sequence == self.num_sequences:  # empty documents at the end
            return self.num_tokens
        if not 0 <= sequence < self.num_sequences:
            raise refuse(f"{self.prefix}.idx", f"begins document {index} at sequence {sequence}")
        start, remainder = divmod(int(self.sequence_pointers[sequence]), self.dtype.itemsize)
        if remainder or not 0 <= start <= self.num_tokens:
            raise refuse(
                f"{self.prefix}.idx", f"puts sequence {sequence} at byte {start * self.dtype.itemsize + remainder}"
            )
        return start

    def document_at(self, token_offset: int) -> int:
        """The document that the token at this offset of the `.bin` belongs to (two binary searches).

        Raises:
            IndexError: there is no such token.
        """
        if not 0 <= token_offset < self.num_tokens:
            raise IndexError(f"{self.prefix}.bin: token {token_offset} of {self.num_tokens}")
        # bisect looks at a few entries; np.searchsorted would first copy the whole unaligned table
        sequence = bisect_right(self.sequence_pointers, token_offset * self.dtype.itemsize) - 1
        return bisect_right(self.document_indices, sequence) - 1

    def close(self) -> None:
        """Lets go of the memory maps; they come back when asked for."""
        for name in ("sizes", "sequence_pointers", "document_indices"):
            self.__dict__.pop(name, None)

    def _check_range(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"{self.prefix}.bin: tokens [{start}, {start + count}) of {self.num_tokens}")

    def _open_tokens(self) -> RangeFile:
        return self.tokens_file or open_ranges(f"{self.prefix}.bin")

    def _table(self, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        if count == 0:
            return np.empty(0, dtype)
        if is_remote(self.prefix):
            with open_ranges(f"{self.prefix}.idx") as idx:
                return np.frombuffer(idx.read(offset, count * np.dtype(dtype).itemsize), dtype)
        return np.memmap(f"{self.prefix}.idx", dtype=dtype, mode="r", offset=offset, shape=(count,))


def expand_prefixes(path: str | list[str]) -> list[str]:
    """The data sets that a `path` of run.yaml names.

    Args:
        path: a prefix, a list of prefixes, or a glob matched against `*.idx` (each match once, in sorted order).
            A trailing `.bin` or `.idx` is accepted.

    Returns:
        prefixes in the order given; not checked to exist where no glob was used (`read_header` says what is missing).

    Raises:
        UserError: an empty list, a glob that matches nothing, or the same prefix twice.
    """
    prefixes: list[str] = []
    for entry in [path] if isinstance(path, str) else path:
        stem = _without_ending(entry)
        if glob.has_magic(stem) and not is_file(f"{stem}.idx"):
            found = sorted(map(_without_ending, find(f"{stem}.idx")))
            if not found:
                raise UserError(f"{entry}: no file matches {stem}.idx")
            prefixes += found
        else:
            prefixes.append(stem)
    if not prefixes:
        raise UserError("path: an empty list names no data; give a prefix of .bin/.idx, a list of them, or a glob")
    twice = sorted(prefix for prefix, count in Counter(prefixes).items() if count > 1)
    if twice:
        raise UserError(f"path: {', '.join(twice)} is named more than once; to see data more often raise its weight")
    return prefixes


def _without_ending(path: str) -> str:
    return path[:-4] if path.endswith((".bin", ".idx")) else path
