"""Documents of a list NAME.docs, read as one dataset without copying their tokens.

Example: a list names document 1 of a pair with documents [7, 8, 9] and [5], and document 0 of a pair with [4, 4]. The
dataset then has two documents and three tokens, 5 4 4, exactly like a pair into which these documents were copied.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.document_list import (
    DocumentList,
    is_document_list,
    open_listed_datasets,
    read_document_list,
)
from megatron_cpt.data.tokenfile.documents import document_bounds
from megatron_cpt.data.tokenfile.header import IndexHeader
from megatron_cpt.data.tokenfile.reader import FileRange, IndexedDataset, expand_prefixes, real_files
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.identity import FileIdentity
from megatron_cpt.files.whole_io import exists

_INDEX_BLOCK = 1 << 14  # documents of a pair whose bounds are read at a time


def open_dataset(path: str | os.PathLike[str]) -> IndexedDataset:
    """Open a document list NAME.docs, or a .bin/.idx pair by its prefix.

    Raises:
        UserError: a file is missing.
        RefusedError: the list or a dataset is damaged, or a dataset has changed since the list was made.
    """
    return ListedDocuments(path) if is_document_list(path) else IndexedDataset(path)


def open_source(path: str | list[str]) -> list[IndexedDataset]:
    """Open the datasets and document lists of a source in run.yaml; see `expand_prefixes`.

    Raises:
        UserError: a file is missing, or a document would be read twice per epoch.
        RefusedError: a list or a dataset is damaged, or a dataset has changed since a list was made.
    """
    datasets = [open_dataset(prefix) for prefix in expand_prefixes(path)]
    readers: dict[tuple[str, ...], list[tuple[str, npt.NDArray[np.int64] | None]]] = {}
    for dataset in datasets:
        for index, pair in enumerate(dataset.parts):
            starts = dataset.starts_in(index) if isinstance(dataset, ListedDocuments) else None
            if starts is None or starts.size:
                readers.setdefault(real_files(pair.prefix), []).append((dataset.prefix, starts))
    for found in readers.values():
        _require_different_documents(found)
    return datasets


def _require_different_documents(readers: Sequence[tuple[str, npt.NDArray[np.int64] | None]]) -> None:
    """Check that no document of a pair is read twice, by two lists, by one list, or by a list and the pair.

    Args:
        readers: name of the list and first tokens of its documents, or name of the pair and None.
    """
    listed = [starts for _, starts in readers if starts is not None]
    repeats = sum(map(len, listed))
    if len(listed) == len(readers):
        repeats -= len(np.unique(np.concatenate(listed)))
    if repeats:
        raise UserError(
            f"path: {' and '.join(dict.fromkeys(name for name, _ in readers))} name {repeats:,} documents more than "
            "once, which would be read twice; give only one of them, or make sources of their own of them"
        )


class ListedDocuments(IndexedDataset):
    """Dataset of the documents that a list names, one after another, with one sequence each.

    Memory: 16 bytes per listed document.

    Args:
        path: the document list.

    Raises:
        UserError: a file is missing, or the token types of the pairs differ.
        RefusedError: the list or a pair is damaged, or a pair has changed since the list was made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(path)
        identity = FileIdentity.read(path) if exists(path) else None
        listed = read_document_list(path)
        self._parts = tuple(open_listed_datasets(path, listed))
        self.dtype = self._common_dtype()
        self._first_of_part = np.searchsorted(listed.dataset, np.arange(len(self._parts))).tolist()
        self._starts = np.empty(listed.num_chosen, np.int64)  # first token in the pair of the document
        self._pointers = np.zeros(listed.num_chosen + 1, np.int64)  # cumulative sizes, in bytes
        for index, part in enumerate(self._parts):
            first = self._first_of_part[index]
            _find_documents(part, listed.chosen_of(index), self._starts[first:], self._pointers[first + 1 :])
        np.cumsum(self._pointers, out=self._pointers)
        self._pointers *= self.dtype.itemsize
        self._list_digest = _digest(listed)
        self.num_documents = self.num_sequences = listed.num_chosen
        self.num_tokens = int(self._pointers[-1]) // self.dtype.itemsize
        sizes = (self.num_sequences, self.num_documents, self.num_tokens)
        self.header = IndexHeader(self.prefix, self.dtype, *sizes, identities=(identity, None))
        self.tokens_file = None

    @property
    def parts(self) -> tuple[IndexedDataset, ...]:
        """Pairs that the list chooses from."""
        return self._parts

    def starts_in(self, index: int) -> npt.NDArray[np.int64]:
        """Return the first token of each document with tokens that is in one pair; no two documents share one."""
        first, stop = [*self._first_of_part, self.num_documents][index : index + 2]
        starts: npt.NDArray[np.int64] = self._starts[first:stop][np.diff(self._pointers[first : stop + 1]) > 0]
        return starts

    @property
    def list_digest(self) -> bytes:
        """Hash of the chosen documents."""
        return self._list_digest

    @property
    def sizes(self) -> npt.NDArray[np.int32]:  # type: ignore[override]
        """Tokens of each document."""
        return (np.diff(self._pointers) // self.dtype.itemsize).astype(np.int32)

    @property
    def sequence_pointers(self) -> npt.NDArray[np.int64]:  # type: ignore[override]
        """Offset of each document in the concatenated tokens, in bytes."""
        return self._pointers[:-1]

    @property
    def document_indices(self) -> range:  # type: ignore[override]
        """First sequence of each document: its own number."""
        return range(self.num_documents + 1)

    def file_ranges(self, start: int, count: int) -> Iterator[FileRange]:
        """Yield the pieces of documents that tokens [start, start + count) consist of."""
        if not count:
            return
        itemsize = self.dtype.itemsize
        first, last = np.searchsorted(self._pointers, [start * itemsize, (start + count - 1) * itemsize], "right") - 1
        bounds = self._pointers[first : last + 2] // itemsize
        skipped = np.maximum(start - bounds[:-1], 0)
        counts = np.minimum(bounds[1:], start + count) - bounds[:-1] - skipped
        offsets = self._starts[first : last + 1] + skipped
        for document, offset, size in zip(range(first, last + 1), offsets.tolist(), counts.tolist(), strict=True):
            if size:
                part = self._parts[bisect_right(self._first_of_part, document) - 1]
                yield FileRange(part, offset, size)

    def read_rows(self, starts: Sequence[int], rows: Sequence[npt.NDArray[Any]]) -> None:
        """See `IndexedDataset.read_rows`; each pair is opened once."""
        reads: dict[IndexedDataset, tuple[list[int], list[npt.NDArray[Any]]]] = {}
        for start, row in zip(starts, rows, strict=True):
            self._check_range(start, row.size)
            done = 0
            for part, offset, count in self.file_ranges(start, row.size):
                part_starts, part_rows = reads.setdefault(part, ([], []))
                part_starts.append(offset)
                part_rows.append(row[done : done + count])
                done += count
        for part, (part_starts, part_rows) in reads.items():
            part.read_rows(part_starts, part_rows)

    def will_read(self, starts: Sequence[int], counts: Sequence[int]) -> None:
        """See `IndexedDataset.will_read`."""
        reads: dict[IndexedDataset, tuple[list[int], list[int]]] = {}
        for start, count in zip(starts, counts, strict=True):
            for part, offset, size in self.file_ranges(start, count):
                part_starts, part_counts = reads.setdefault(part, ([], []))
                part_starts.append(offset)
                part_counts.append(size)
        for part, (part_starts, part_counts) in reads.items():
            part.will_read(part_starts, part_counts)

    def check_unchanged(self) -> None:
        """Compare the list and its pairs with the files that were opened."""
        super().check_unchanged()
        for part in self._parts:
            part.check_unchanged()

    def close(self) -> None:
        """Release the pages of the pairs' indices."""
        for part in self._parts:
            part.close()

    def _common_dtype(self) -> np.dtype[Any]:
        if not self._parts:
            raise RefusedError(f"{self.prefix}: names no dataset; write the list again with `megatron-cpt mine`")
        first = self._parts[0]
        for part in self._parts:
            if part.dtype != first.dtype:
                raise UserError(
                    f"{self.prefix}: {part.prefix} has {part.dtype.name} tokens, {first.prefix} has "
                    f"{first.dtype.name}: their vocabularies differ; make one list for each of them"
                )
        return first.dtype


def _find_documents(
    pair: IndexedDataset,
    documents: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
) -> None:
    """Fill in the first token and the number of tokens of each document; only their part of the index is read."""
    cuts = (np.flatnonzero(np.diff(documents // _INDEX_BLOCK)) + 1).tolist()
    for begin, end in pairwise([0, *cuts, len(documents)]):
        if begin < end:
            chosen = documents[begin:end]
            bounds = document_bounds(pair, int(chosen[0]), int(chosen[-1]) + 1)
            starts[begin:end] = bounds[chosen - chosen[0]]
            sizes[begin:end] = bounds[chosen - chosen[0] + 1] - starts[begin:end]


def _digest(listed: DocumentList) -> bytes:
    """Hash the chosen documents, not the paths of the pairs: a list may move with them."""
    digest = hashlib.sha256()
    for column in (listed.dataset, listed.document):
        digest.update(np.ascontiguousarray(column.astype(column.dtype.newbyteorder("<"))).data)
    return digest.digest()
