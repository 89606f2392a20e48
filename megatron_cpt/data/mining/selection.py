"""Choice of documents: the union of the neighbors, without copies and without held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.contamination.ngrams import ngram_hashes
from megatron_cpt.data.contamination.overlap import NEAR, NGRAM, HeldOutDocument, HeldOutSet
from megatron_cpt.data.mining.search import NONE, Neighbors
from megatron_cpt.data.tokenfile.documents import DocumentBlock

_MOST_NGRAMS = 1 << 14  # per document, the ones with the smallest hashes, so that a long document takes 128 KiB
_BATCH = 256  # documents compared with the held-out set at a time

ReadIds = Callable[[int], "npt.NDArray[Any]"]
"""Function from the number of a document to its ids, without the id that ends it."""


@dataclass(frozen=True)
class Mined:
    """Chosen documents, numbered over all datasets of the corpus one after the other.

    Attributes:
        documents: int64 (count,), ascending.
        distances: float32 (count,), to the nearest query.
        queries: int64 (count,), the nearest query.
    """

    documents: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    queries: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.documents)

    def select(self, keep: npt.NDArray[np.bool_]) -> Mined:
        """Return the documents that are marked."""
        return Mined(self.documents[keep], self.distances[keep], self.queries[keep])


def unite(neighbors: Neighbors) -> Mined:
    """Return each document once, with its nearest query; of equally near queries, the first one."""
    queries, columns = np.nonzero(neighbors.documents != NONE)
    documents, distances = neighbors.documents[queries, columns], neighbors.distances[queries, columns]
    order = np.lexsort((queries, distances, documents))
    mined = Mined(documents[order], distances[order], queries[order].astype(np.int64))
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = mined.documents[1:] != mined.documents[:-1]
    return mined.select(is_first)


@dataclass(frozen=True)
class Copies:
    """Marks of near-duplicates among mined documents, bool (count,) each.

    Attributes:
        of_query: the document is a near-duplicate of its query.
        of_document: it is a near-duplicate of another mined document.
    """

    of_query: npt.NDArray[np.bool_]
    of_document: npt.NDArray[np.bool_]


def find_copies(mined: Mined, read_ids: ReadIds, query_ids: ReadIds, share: float = NEAR) -> Copies:
    """Find documents that add nothing new.

    A document is a near-duplicate if at least `share` of its distinct 13-grams are in its nearest query, or in one
    document that was mined for the same query, is kept, and is nearer; or if their ids are equal. Near-duplicates have
    nearly equal vectors, so they share the nearest query. At most k documents are compared with each other.
    """
    copies = Copies(np.zeros(len(mined), np.bool_), np.zeros(len(mined), np.bool_))
    order = np.lexsort((mined.documents, mined.distances, mined.queries))
    for group in np.split(order, np.flatnonzero(np.diff(mined.queries[order])) + 1):
        if not group.size:
            continue
        documents = mined.documents[group].tolist()
        texts = [query_ids(int(mined.queries[group[0]])), *map(read_ids, documents)]
        is_within = _containment(texts, share)
        kept = [0]  # the query, then documents by their place in the group, from 1
        for place, index in enumerate(group.tolist(), 1):
            original = next((other for other in kept if is_within[place, other]), None)
            if original is None:
                kept.append(place)
            elif original == 0:
                copies.of_query[index] = True
            else:
                copies.of_document[index] = True
    return copies


def _containment(texts: Sequence[npt.NDArray[Any]], share: float) -> npt.NDArray[np.bool_]:
    """Return whether text i has `share` of its distinct n-grams in text j, or equals it without any; bool (n, n)."""
    grams = [np.unique(ngram_hashes(ids, NGRAM))[:_MOST_NGRAMS] for ids in texts]
    _, members, counts = np.unique(np.concatenate(grams), return_inverse=True, return_counts=True)
    owners = np.repeat(np.arange(len(texts)), [len(each) for each in grams])
    columns = np.cumsum(counts > 1) - 1  # only n-grams of several texts are compared
    is_shared = counts[members] > 1
    table = np.zeros((len(texts), int((counts > 1).sum())), np.float32)
    table[owners[is_shared], columns[members[is_shared]]] = 1
    shared = table @ table.T
    sizes = np.array([[_comparable(one, other) for other in grams] for one in grams])
    is_within: npt.NDArray[np.bool_] = (sizes > 0) & (shared >= share * sizes)
    for i, j in np.argwhere(np.array([len(each) == 0 for each in grams])[:, None] & (sizes == 0)):
        is_within[i, j] = not len(grams[j]) and np.array_equal(texts[i], texts[j])
    return is_within


def _comparable(grams: npt.NDArray[np.uint64], others: npt.NDArray[np.uint64]) -> int:
    """Return how many n-grams can be compared: of a long text only the smallest hashes are known."""
    return len(grams) if len(others) < _MOST_NGRAMS else int(np.searchsorted(grams, others[-1], side="right"))


def find_held_out(
    mined: Mined, read_ids: ReadIds, held_out: HeldOutSet
) -> tuple[npt.NDArray[np.bool_], list[HeldOutDocument]]:
    """Mark the mined documents that share a 13-gram with a held-out document, or are a copy of one.

    Returns:
        bool (count,), and the held-out documents that were found.
    """
    marks: list[npt.NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
    for first in range(0, len(mined), _BATCH):
        documents = [read_ids(number) for number in mined.documents[first : first + _BATCH].tolist()]
        bounds = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        block = DocumentBlock(first, np.concatenate(documents), bounds, 0)
        marks.append(held_out.search("mined documents", block)[0])
    found = [replace(document) for document in held_out.results() if document.found or document.copies]
    return np.concatenate(marks), found


def locate(documents: npt.NDArray[np.int64], starts: Sequence[int]) -> tuple[npt.NDArray[np.int32], Any]:
    """Return dataset and number in the dataset of documents that are numbered over all datasets.

    Args:
        starts: number of each dataset's first document, then the total.
    """
    edges = np.asarray(starts, np.int64)
    dataset = np.searchsorted(edges, documents, side="right") - 1
    return dataset.astype(np.int32), documents - edges[dataset]
