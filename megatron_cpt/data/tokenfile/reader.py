"""Reader of Megatron's `.bin`/`.idx` token files, and the search for them by prefix or glob.

The `.bin` is read with `pread` instead of a memory map, for three reasons. A read releases the interpreter lock, so the
prefetching thread does not stall a training step on a page fault. A failing disk or a truncated file raises an
exception instead of SIGBUS. No descriptor stays open, so ten thousand files fit under the usual limit of 1,024.
The tables of the `.idx` are read in the same way, a page at a time; training does not need them.
"""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.header import LIST_ENDING, IndexHeader, best_dtype, read_header, refuse
from megatron_cpt.data.tokenfile.numbers import NumberTable
from megatron_cpt.data.tokenfile.sidecar import Origin, join_origins, read_sidecar
from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.remote import RangeFile, find, is_file, is_remote, open_ranges

__all__ = [
    "IndexHeader",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "best_dtype",
    "expand_prefixes",
    "read_header",
]


class FileRange(NamedTuple):
    """Consecutive tokens of one .bin/.idx pair; start is the offset in the `.bin`, in tokens."""

    pair: IndexedDataset
    start: int
    num_tokens: int


class IndexedDataset:
    """Dataset in a PREFIX.bin/PREFIX.idx pair. Opening it reads only the header, regardless of its size.

    Args:
        prefix: path without `.bin` or `.idx`.

    Attributes:
        tokens_file: file that the tokens are read from, such as a cache (see `disk_cache.py`); None: the `.bin` itself,
            opened for each read.

    Every read compares the file with the one that was opened here: a dataset that is replaced during a run would be
    read in part, and no later check could tell.

    Raises:
        UserError: a file is missing.
        RefusedError: the files are damaged or not a pair (see `read_header`).
        ChangedFileError: from a read: a file was replaced or written to since it was opened.
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

    @property
    def parts(self) -> tuple[IndexedDataset, ...]:
        """Pairs that hold the tokens: this one, or those that a document list chooses from."""
        return (self,)

    @property
    def list_digest(self) -> bytes:
        """Hash of the documents that a document list chooses; empty for a pair."""
        return b""

    @cached_property
    def sizes(self) -> NumberTable:
        """Tokens of each sequence, (num_sequences,)."""
        return self._table("<i4", self.header.sizes_offset, self.num_sequences)

    @cached_property
    def sequence_pointers(self) -> NumberTable:
        """Offset of each sequence in the `.bin`, in bytes, (num_sequences,)."""
        return self._table("<i8", self.header.pointers_offset, self.num_sequences)

    @cached_property
    def document_indices(self) -> NumberTable:
        """First sequence of each document, and num_sequences at the end, (num_documents + 1,)."""
        return self._table("<i8", self.header.documents_offset, self.num_documents + 1)

    def read(self, start: int, count: int) -> npt.NDArray[Any]:
        """Return tokens [start, start + count) of the `.bin`, regardless of document boundaries.

        Raises:
            IndexError: the range is not inside the file.
            RefusedError: the file became shorter since it was opened.
        """
        self._check_range(start, count)
        tokens = np.empty(count, self.dtype)
        self.read_rows([start], [tokens])
        return tokens

    def read_rows(self, starts: Sequence[int], rows: Sequence[npt.NDArray[Any]]) -> None:
        """Fill each row with consecutive tokens of the `.bin`; the file is opened once.

        Args:
            starts: offset of each row's first token.
            rows: contiguous arrays of the file's token type.

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
            file.check(self.header.identities[0])
            for start, row in zip(starts, rows, strict=True):
                if file.read_into(row.data.cast("B"), start * itemsize) < row.nbytes:
                    sizes = f"from {self.num_tokens * itemsize} to {file.size} bytes"
                    raise refuse(f"{self.prefix}.bin", f"was truncated {sizes} since it was opened")

    def file_ranges(self, start: int, count: int) -> Iterator[FileRange]:
        """Yield where tokens [start, start + count) are: one range of a pair, many of a document list."""
        yield FileRange(self, start, count)

    def will_read(self, starts: Sequence[int], counts: Sequence[int]) -> None:
        """Announce that `counts` tokens from each start will be read soon; the disk can fetch them in parallel."""
        itemsize = self.dtype.itemsize
        with self._open_tokens() as file:
            for start, count in zip(starts, counts, strict=True):
                file.will_read(start * itemsize, count * itemsize)

    def document(self, index: int) -> npt.NDArray[Any]:
        """Return all tokens of a document.

        Raises:
            IndexError: the document does not exist.
            RefusedError: the index is damaged.
        """
        start = self.document_start(index)
        end = self.num_tokens if index == self.num_documents - 1 else self.document_start(index + 1)
        if end < start:
            raise refuse(f"{self.prefix}.idx", f"starts document {index + 1} before the end of document {index}")
        return self.read(start, end - start)

    def document_start(self, index: int) -> int:
        """Return the offset of a document's first token in the `.bin`, in tokens.

        Raises:
            IndexError: the document does not exist.
            RefusedError: the index points outside the data.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: document {index} of {self.num_documents}")
        sequence = int(self.document_indices[index])
        if sequence == self.num_sequences:  # empty documents at the end
            return self.num_tokens
        if not 0 <= sequence < self.num_sequences:
            raise refuse(f"{self.prefix}.idx", f"starts document {index} at sequence {sequence}")
        start, remainder = divmod(int(self.sequence_pointers[sequence]), self.dtype.itemsize)
        if remainder or not 0 <= start <= self.num_tokens:
            raise refuse(
                f"{self.prefix}.idx", f"puts sequence {sequence} at byte {start * self.dtype.itemsize + remainder}"
            )
        return start

    def document_at(self, token_offset: int) -> int:
        """Return the document that contains the token at this offset of the `.bin` (two binary searches).

        Raises:
            IndexError: the token does not exist.
        """
        if not 0 <= token_offset < self.num_tokens:
            raise IndexError(f"{self.prefix}.bin: token {token_offset} of {self.num_tokens}")
        sequence = bisect_right(self.sequence_pointers, token_offset * self.dtype.itemsize) - 1
        return bisect_right(self.document_indices, sequence) - 1

    def check_unchanged(self) -> None:
        """Compare both files with the ones that were opened; called before a result of them is published.

        Raises:
            ChangedFileError: a file was replaced, written to or removed.
        """
        self.header.check_unchanged()

    def close(self) -> None:
        """Release the pages of the `.idx`; they are read again at the next use."""
        for name in ("sizes", "sequence_pointers", "document_indices"):
            self.__dict__.pop(name, None)

    def _check_range(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"{self.prefix}.bin: tokens [{start}, {start + count}) of {self.num_tokens}")

    def _open_tokens(self) -> RangeFile:
        return self.tokens_file or open_ranges(f"{self.prefix}.bin")

    def _table(self, dtype: str, offset: int, count: int) -> NumberTable:
        return NumberTable(f"{self.prefix}.idx", dtype, offset, count, self.header.identities[1])


def open_with_one_dtype(prefixes: Sequence[str]) -> list[IndexedDataset]:
    """Open datasets that will be written together, and check that their token types are equal.

    Raises:
        UserError: no dataset is given, a file is missing, or the token types differ.
        RefusedError: a dataset is damaged.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    if not datasets:
        raise UserError("no dataset is given; name at least one prefix of .bin/.idx")
    first = datasets[0]
    for dataset in datasets:
        if dataset.dtype != first.dtype:
            raise UserError(
                f"{dataset.prefix}: has {dataset.dtype.name} tokens, {first.prefix} has {first.dtype.name}: their "
                "vocabularies differ; process them separately, or build one again with `megatron-cpt preprocess`"
            )
    return datasets


def join_tokenizers(
    datasets: Sequence[IndexedDataset], command: str, options: Mapping[str, Any], *, allow_mixed: bool
) -> Origin:
    """Return the origin of a dataset that is made of others.

    Args:
        command, options: the command that makes it, and its main options.
        allow_mixed: accept datasets whose sidecars name different tokenizers; the result's tokenizer is then unknown.

    Raises:
        RefusedError: the tokenizers differ, or a sidecar describes other files.
    """
    sidecars = [read_sidecar(dataset.header) for dataset in datasets]
    origins = [None if sidecar is None else sidecar.origin for sidecar in sidecars]
    known = [
        (dataset.prefix, origin)
        for dataset, origin in zip(datasets, origins, strict=True)
        if origin is not None and origin.fingerprint is not None
    ]
    for prefix, origin in known[1:]:
        if origin.fingerprint != known[0][1].fingerprint and not allow_mixed:
            raise RefusedError(
                f"{prefix}: its ids are of tokenizer {origin.name}, {known[0][0]} has {known[0][1].name}: equal ids "
                "mean other text; process them separately, or join them anyway: --allow-mixed-tokenizers"
            )
    inputs = [os.path.basename(dataset.prefix) for dataset in datasets]
    return join_origins(origins, {"command": command, "inputs": inputs, **options})


def expand_prefixes(path: str | list[str]) -> list[str]:
    """Expand the `path` of a source in run.yaml to dataset prefixes.

    Example: ["data/web", "data/code-*"] becomes ["data/web", "data/code-0", "data/code-1"].

    Args:
        path: a prefix, a glob over `.idx` files (matches are sorted), a document list `NAME.docs`, a glob over such
            lists, or a list of these. Prefixes may end in `.bin` or `.idx`.

    Returns:
        Prefixes in the given order. A prefix without a glob may not exist; `read_header` checks that.

    Raises:
        UserError: the list is empty, a glob has no match, or a dataset occurs twice, also under different paths.
    """
    prefixes: list[str] = []
    for entry in [path] if isinstance(path, str) else path:
        stem = _without_ending(entry)
        name = stem if stem.endswith(LIST_ENDING) else f"{stem}.idx"
        if glob.has_magic(stem) and not is_file(name):
            found = sorted(map(_without_ending, find(name)))
            if not found:
                raise UserError(f"{entry}: no file matches {name}")
            prefixes += found
        else:
            prefixes.append(stem)
    if not prefixes:
        raise UserError("path: an empty list names no data; give a prefix of .bin/.idx, a list of them, or a glob")
    if twice := find_repeated(prefixes):
        paths = ", under several paths" if len(twice) > 1 else ""
        raise UserError(
            f"path: {', '.join(twice)} is named more than once{paths}; to see data more often raise its weight"
        )
    return prefixes


def find_repeated(prefixes: Sequence[str]) -> list[str]:
    """Return the prefixes of datasets that occur twice, also under different paths; each prefix once, sorted."""
    files = [real_files(prefix) for prefix in prefixes]
    counts = Counter(files)
    return sorted({prefix for prefix, own in zip(prefixes, files, strict=True) if counts[own] > 1})


def real_files(prefix: str) -> tuple[str, ...]:
    """Return the files of a pair, or of a document list, without links; equal for two paths of one dataset."""
    paths = [prefix] if prefix.endswith(LIST_ENDING) else [f"{prefix}.bin", f"{prefix}.idx"]
    return tuple(path if is_remote(path) else os.path.realpath(path) for path in paths)


def _without_ending(path: str) -> str:
    return path[:-4] if path.endswith((".bin", ".idx")) else path
