"""A data set as documents: where they begin and end, and all of them in order in bounded memory."""

from __future__ import annotations

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
    """Some neighboring documents.

    Attributes:
        first: number of the first one in its data set.
        tokens: their tokens, one document after another.
        bounds: int64 (num_documents + 1,), where each begins in `tokens`, and where the last one ends.
        token_offset: where `tokens` begins in the `.bin`, in tokens.
    """

    first: int
    tokens: npt.NDArray[Any]
    bounds: npt.NDArray[np.int64]
    token_offset: int

    @property
    def num_documents(self) -> int:
        """How many there are."""
        return len(self.bounds) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each, (num_documents,)."""
        return np.diff(self.bounds)

    def document(self, place: int) -> npt.NDArray[Any]:
        """The tokens of one; `place` counts from 0 in this block."""
        tokens: npt.NDArray[Any] = self.tokens[self.bounds[place] : self.bounds[place + 1]]
        return tokens


def document_bounds(dataset: IndexedDataset, first: int, stop: int) -> npt.NDArray[np.int64]:
    """Where documents [first, stop) begin in the `.bin`, in tokens, and where the last of them ends.

    Returns:
        int64 (stop - first + 1,), never falling.

    Raises:
        RefusedError: the index leads outside of the data or backwards.
    """
    assert 0 <= first <= stop <= dataset.num_documents, f"documents [{first}, {stop}) of {dataset.num_documents}"
    sequences = np.array(dataset.document_indices[first : stop + 1], np.int64)
    if int(sequences.min()) < 0 or int(sequences.max()) > dataset.num_sequences or (np.diff(sequences) < 0).any():
        raise refuse(f"{dataset.prefix}.idx", f"has document boundaries out of order in documents [{first}, {stop})")
    starts = np.full(len(sequences), dataset.num_tokens, np.int64)
    # a document that begins behind the last sequence is an empty one at the end
    inside = sequences[sequences < dataset.num_sequences]
    if inside.size:
        # a slice is copied whole before it is indexed: numpy would copy all of a table that is not aligned
        pointers = np.array(dataset.sequence_pointers[inside[0] : inside[-1] + 1], np.int64)
        starts[: inside.size] = pointers[inside - inside[0]] // dataset.dtype.itemsize
    if int(starts[0]) < 0 or int(starts[-1]) > dataset.num_tokens or (np.diff(starts) < 0).any():
        raise refuse(f"{dataset.prefix}.idx", f"has sequence pointers out of order in documents [{first}, {stop})")
    return starts


def bounds_in_blocks(dataset: IndexedDataset) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """The bounds of all documents, a block at a time: the number of its first document, and `document_bounds`."""
    for first in range(0, dataset.num_documents, BLOCK_DOCUMENTS):
        yield first, document_bounds(dataset, first, min(first + BLOCK_DOCUMENTS, dataset.num_documents))


def document_blocks(dataset: IndexedDataset, block_tokens: int = BLOCK_TOKENS) -> Iterator[DocumentBlock]:
    """All documents in order.

    Args:
        dataset: the data set.
        block_tokens: at most so many at a time; a longer document makes a block of its own.

    Raises:
        RefusedError: the index is damaged or the file became shorter since it was opened.
    """
    for first, bounds in bounds_in_blocks(dataset):
        place, last = 0, len(bounds) - 1
        while place < last:
            fits = int(np.searchsorted(bounds, bounds[place] + block_tokens, side="right")) - 1
            stop = min(last, max(fits, place + 1))
            start = int(bounds[place])
            tokens = dataset.read(start, int(bounds[stop]) - start)
            yield DocumentBlock(first + place, tokens, bounds[place : stop + 1] - start, start)
            place = stop
