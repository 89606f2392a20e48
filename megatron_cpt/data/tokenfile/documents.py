"""Documents of a dataset: their boundaries, and iteration over all documents in constant memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.header import refuse
from megatron_cpt.data.tokenfile.reader import IndexedDataset

BLOCK_DOCUMENTS = 1 << 16
BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class DocumentBlock:
    """Consecutive documents of a dataset.

    Example: documents [7, 8, 9] and [5] are tokens [7, 8, 9, 5] with bounds [0, 3, 4].

    Attributes:
        first: index of the first document in its dataset.
        tokens: concatenated tokens of the documents.
        bounds: int64 (num_documents + 1,), offset of each document in `tokens`, and the end of the last one.
        token_offset: offset of `tokens` in the `.bin`, in tokens.
    """

    first: int
    tokens: npt.NDArray[Any]
    bounds: npt.NDArray[np.int64]
    token_offset: int

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.bounds) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per document, (num_documents,)."""
        return np.diff(self.bounds)

    def document(self, index: int) -> npt.NDArray[Any]:
        """Return the tokens of a document; `index` counts from 0 in this block."""
        tokens: npt.NDArray[Any] = self.tokens[self.bounds[index] : self.bounds[index + 1]]
        return tokens


def document_bounds(dataset: IndexedDataset, first: int, stop: int) -> npt.NDArray[np.int64]:
    """Return the offsets of documents [first, stop) in the `.bin`, in tokens, and the end of the last one.

    Returns:
        int64 (stop - first + 1,), in ascending order.

    Raises:
        RefusedError: the index points outside the data or backwards.
    """
    assert 0 <= first <= stop <= dataset.num_documents, f"documents [{first}, {stop}) of {dataset.num_documents}"
    sequences = np.array(dataset.document_indices[first : stop + 1], np.int64)
    if int(sequences.min()) < 0 or int(sequences.max()) > dataset.num_sequences or (np.diff(sequences) < 0).any():
        raise refuse(f"{dataset.prefix}.idx", f"has document boundaries out of order in documents [{first}, {stop})")
    starts = np.full(len(sequences), dataset.num_tokens, np.int64)
    # documents that start after the last sequence are empty ones at the end
    inside = sequences[sequences < dataset.num_sequences]
    if inside.size:
        pointers = np.array(dataset.sequence_pointers[inside[0] : inside[-1] + 1], np.int64)
        starts[: inside.size] = pointers[inside - inside[0]] // dataset.dtype.itemsize
    if int(starts[0]) < 0 or int(starts[-1]) > dataset.num_tokens or (np.diff(starts) < 0).any():
        raise refuse(f"{dataset.prefix}.idx", f"has sequence pointers out of order in documents [{first}, {stop})")
    return starts


def document_ends(dataset: IndexedDataset, start: int, count: int) -> npt.NDArray[np.bool_]:
    """Return which of the tokens [start, start + count) are the last one of their document, by the `.idx`.

    Example: for documents [7, 8, 9] and [5], tokens 1 to 3 give [False, True, True].

    Returns:
        bool (count,).

    Raises:
        RefusedError: the index points outside the data or backwards.
    """
    assert 0 <= start <= start + count <= dataset.num_tokens
    itemsize = dataset.dtype.itemsize
    pointers, documents = dataset.sequence_pointers, dataset.document_indices
    first, stop = (bisect_right(pointers, offset * itemsize) for offset in (start, start + count))
    first_document, stop_document = bisect_left(documents, first), bisect_left(documents, stop)
    sequences = np.array(documents[first_document:stop_document], np.int64)
    if sequences.size and not first <= int(sequences.min()) <= int(sequences.max()) < stop:
        raise refuse(f"{dataset.prefix}.idx", f"has document boundaries out of order near token {start}")
    starts = np.array(pointers[first:stop], np.int64)[sequences - first] // itemsize - start
    if starts.size and not 1 <= int(starts.min()) <= int(starts.max()) <= count:
        raise refuse(f"{dataset.prefix}.idx", f"has sequence pointers out of order near token {start}")
    ends = np.zeros(count, np.bool_)
    ends[starts - 1] = True
    if count and start + count == dataset.num_tokens:
        ends[-1] = True
    return ends


def bounds_in_blocks(dataset: IndexedDataset) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Yield the bounds of all documents in blocks: index of the block's first document, and its `document_bounds`."""
    for first in range(0, dataset.num_documents, BLOCK_DOCUMENTS):
        yield first, document_bounds(dataset, first, min(first + BLOCK_DOCUMENTS, dataset.num_documents))


def document_blocks(dataset: IndexedDataset, block_tokens: int = BLOCK_TOKENS) -> Iterator[DocumentBlock]:
    """Yield all documents in order, in blocks of at most `block_tokens`; a longer document is a block of its own.

    Raises:
        RefusedError: the index is damaged or the file became shorter since it was opened.
    """
    for first, bounds in bounds_in_blocks(dataset):
        start, end = 0, len(bounds) - 1
        while start < end:
            fits = int(np.searchsorted(bounds, bounds[start] + block_tokens, side="right")) - 1
            stop = min(end, max(fits, start + 1))
            offset = int(bounds[start])
            tokens = dataset.read(offset, int(bounds[stop]) - offset)
            yield DocumentBlock(first + start, tokens, bounds[start : stop + 1] - offset, offset)
            start = stop
