"""Union of neighbors, near-duplicates, and places of documents over several datasets."""

from __future__ import annotations

import numpy as np

from megatron_cpt.data.mining.search import NONE, Neighbors
from megatron_cpt.data.mining.selection import Mined, find_copies, locate, unite


def test_each_document_has_its_nearest_query():
    distances = np.float32([[0.1, 0.4], [0.2, 0.3], [0.3, np.inf]])
    mined = unite(Neighbors(distances, np.array([[7, 3], [3, 9], [9, NONE]])))
    assert mined.documents.tolist() == [3, 7, 9]
    assert mined.queries.tolist() == [1, 0, 1]  # of two equally near queries, the first one
    assert mined.distances.tolist() == np.float32([0.2, 0.1, 0.3]).tolist()


def copies(documents, queries, nearest=None, distances=None):
    count = len(documents)
    mined = Mined(
        np.arange(count),
        np.arange(count, dtype=np.float32) if distances is None else np.float32(distances),
        np.zeros(count, np.int64) if nearest is None else np.array(nearest),
    )
    found = find_copies(mined, lambda number: np.array(documents[number]), lambda number: np.array(queries[number]))
    return found.of_query.tolist(), found.of_document.tolist()


def ids(first, count=100):
    return list(range(first, first + count))


def test_a_document_that_is_mostly_its_query():
    query = ids(0)
    documents = [ids(0), ids(0, 80), [*ids(0), *ids(500, 20)], [*ids(0), *ids(500, 60)]]
    assert copies(documents[:1], [query])[0] == [True]
    assert copies(documents[1:2], [query])[0] == [True]
    assert copies(documents[2:3], [query])[0] == [True]  # 88 of 108 n-grams
    assert copies(documents[3:], [query])[0] == [False]  # 88 of 148: it adds something new


def test_the_nearer_of_two_near_duplicates_stays():
    documents = [[*ids(0), 9000], ids(0), ids(1000)]
    assert copies(documents, [ids(5000)]) == ([False] * 3, [False, True, False])
    assert copies(documents, [ids(5000)], distances=[2, 1, 0])[1] == [True, False, False]
    assert copies(documents, [ids(5000), ids(6000)], nearest=[0, 1, 0])[1] == [False] * 3  # other queries


def test_short_documents_are_compared_completely():
    assert copies([[1, 2], [1, 2], [1, 3], [1, 2, 3]], [[1, 3]]) == (
        [False, False, True, False],
        [False, True, False, False],
    )


def test_places_over_several_datasets():
    dataset, document = locate(np.array([0, 4, 5, 6]), [0, 5, 5, 7])
    assert dataset.tolist() == [0, 0, 2, 2]
    assert document.tolist() == [0, 4, 0, 1]
