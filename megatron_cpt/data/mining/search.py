"""Search for the nearest documents of each query among the vectors of one range of documents.

`flat` compares every query with every document, exactly. `ivf-pq` looks only at the lists of documents whose centroids
are nearest to the query, estimates distances from 4-bit codes, and computes the exact distance of the best candidates.
It measures itself: it searches more lists, and compares more candidates, until a sample of queries finds the wanted
share of the true neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

Method = Literal["flat", "ivf-pq"]
Vectors = npt.NDArray[np.float32]

NONE = -1  # document of a missing neighbor, whose distance is infinite
SAMPLE = 256  # queries that are also searched exactly, to measure the recall
_LEAST_DOCUMENTS = 2048  # with fewer, training costs more than an exact search
_DOCUMENTS_PER_LIST = 128
_NUMBERS_PER_CODE = 2  # of a vector, in 4 bits
_CANDIDATES = 4  # per wanted neighbor, compared exactly; the first attempt
_ITERATIONS = 10


@dataclass(frozen=True)
class Neighbors:
    """Nearest documents per query, nearest first.

    Attributes:
        distances: float32 (num_queries, k), 1 - cosine similarity; infinite where there are fewer than k documents.
        documents: int64 (num_queries, k), `NONE` where there are fewer than k documents.
    """

    distances: npt.NDArray[np.float32]
    documents: npt.NDArray[np.int64]

    @classmethod
    def none(cls, num_queries: int, k: int) -> Self:
        """Return no neighbors."""
        return cls(np.full((num_queries, k), np.inf, np.float32), np.full((num_queries, k), NONE, np.int64))

    def merge(self, others: Neighbors) -> Neighbors:
        """Return the nearest of two results for other documents; of equal distances, the lower document is nearer."""
        k = self.distances.shape[1]
        distances = np.concatenate([self.distances, others.distances], axis=1)
        documents = np.concatenate([self.documents, others.documents], axis=1)
        order = np.lexsort((documents, distances), axis=1)[:, :k]
        return Neighbors(np.take_along_axis(distances, order, 1), np.take_along_axis(documents, order, 1))

    def recall(self, exact: Neighbors) -> float:
        """Return the share of the exact neighbors that are found; equally near documents count as each other."""
        is_wanted = exact.documents != NONE
        if not is_wanted.any():
            return 1.0
        farthest = np.where(is_wanted, exact.distances, -np.inf).max(axis=1, keepdims=True)
        found = ((self.documents != NONE) & (self.distances <= farthest + 1e-6)).sum(axis=1)
        return float(np.minimum(found, is_wanted.sum(axis=1)).sum() / is_wanted.sum())


def sample_queries(num_queries: int) -> npt.NDArray[np.int64]:
    """Return evenly spaced queries, for measurements."""
    count = min(SAMPLE, num_queries)
    return np.arange(count, dtype=np.int64) * num_queries // max(1, count)


def find_nearest(
    vectors: Vectors, queries: Vectors, k: int, method: Method, recall: float
) -> tuple[Neighbors, Neighbors]:
    """Search the documents of a range; the result depends on the arguments only.

    Args:
        vectors: (num_documents, dimensions), of length 1, or zeros for documents that nothing is near to.
        queries: (num_queries, dimensions), of length 1.
        recall: share of the true neighbors of sampled queries that `ivf-pq` must find in this range.

    Returns:
        Neighbors of all queries, and exact ones of `sample_queries`; documents count from 0 in the range.
    """
    import faiss

    faiss.omp_set_num_threads(1)  # the processes are the parallelism, and the sums have one order
    numbers = np.flatnonzero(vectors.any(axis=1))
    vectors = np.ascontiguousarray(vectors[numbers])
    sample = np.ascontiguousarray(queries[sample_queries(len(queries))])
    flat = faiss.IndexFlatIP(queries.shape[1])
    flat.add(vectors)
    if method == "flat" or len(vectors) < _LEAST_DOCUMENTS:
        found = _search(flat, queries, k, numbers)
        rows = sample_queries(len(queries))
        return found, Neighbors(found.distances[rows], found.documents[rows])
    exact = _search(flat, sample, k, numbers)
    index, num_lists = _train(vectors)
    probes, candidates = max(1, num_lists // 16), _CANDIDATES
    options = _options(probes, candidates)
    while _search(index, sample, k, numbers, options).recall(exact) < recall:
        if probes >= num_lists and candidates * k >= len(vectors):  # every document was compared exactly
            break
        probes, candidates = 2 * probes, 2 * candidates
        options = _options(probes, candidates)
    return _search(index, queries, k, numbers, options), exact


def _train(vectors: Vectors) -> tuple[Any, int]:
    """Return an index of the vectors, and its number of lists."""
    import faiss

    count, dimensions = vectors.shape
    num_lists = max(1, count // _DOCUMENTS_PER_LIST)
    codes = next(n for n in range(max(1, dimensions // _NUMBERS_PER_CODE), 0, -1) if dimensions % n == 0)
    coarse = faiss.IndexFlatIP(dimensions)
    lists = faiss.IndexIVFPQFastScan(coarse, dimensions, num_lists, codes, 4, faiss.METRIC_INNER_PRODUCT)
    for clustering in (lists.cp, lists.pq.cp):
        clustering.niter = _ITERATIONS
        clustering.min_points_per_centroid = 1  # no warning about small ranges
    lists.train(vectors)
    refined = faiss.IndexRefineFlat(lists)
    refined.add(vectors)
    return refined, num_lists


def _options(probes: int, candidates: int) -> Any:
    import faiss

    refine: Any = faiss.IndexRefineSearchParameters  # the stubs do not know their arguments
    lists: Any = faiss.SearchParametersIVF
    return refine(k_factor=candidates, base_index_params=lists(nprobe=probes))


def _search(index: Any, queries: Vectors, k: int, numbers: npt.NDArray[np.int64], options: Any = None) -> Neighbors:
    """Return the neighbors under their numbers in the range."""
    result = Neighbors.none(len(queries), k)
    width = min(k, len(numbers))
    if not width or not len(queries):
        return result
    similarities, found = index.search(queries, width, params=options)
    is_found = found != NONE
    result.documents[:, :width] = np.where(is_found, numbers[np.where(is_found, found, 0)], NONE)
    result.distances[:, :width] = np.where(is_found, np.maximum(0, 1 - similarities), np.inf)
    return result
