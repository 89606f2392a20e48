"""Search within a range: exact results, the recall that ivf-pq promises, and the merge of ranges."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_cpt.data.mining.ranges import decode_result, encode_result
from megatron_cpt.data.mining.search import NONE, Neighbors, find_nearest, sample_queries


def unit_vectors(rng, count, dimensions=32):
    centers = rng.normal(size=(40, dimensions))
    vectors = centers[rng.integers(0, 40, count)] + rng.normal(size=(count, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(3)
    return unit_vectors(rng, 4000), unit_vectors(rng, 300)


def test_flat_is_exact(vectors):
    documents, queries = vectors
    found, exact = find_nearest(documents, queries, 10, "flat", 0.97)
    similarities = queries @ documents.T
    assert (found.documents == np.argsort(-similarities, axis=1)[:, :10]).mean() > 0.999  # equal up to rounding
    np.testing.assert_allclose(found.distances, 1 - np.sort(similarities, axis=1)[:, :-11:-1], atol=1e-5)
    assert (exact.documents == found.documents[sample_queries(300)]).all()


@pytest.mark.parametrize("wanted", [0.8, 0.99])
def test_ivf_pq_finds_the_wanted_share(vectors, wanted):
    documents, queries = vectors
    exact, _ = find_nearest(documents, queries, 10, "flat", wanted)
    found, sample = find_nearest(documents, queries, 10, "ivf-pq", wanted)
    rows = sample_queries(300)
    assert Neighbors(found.distances[rows], found.documents[rows]).recall(sample) >= wanted
    assert found.recall(exact) >= wanted - 0.05  # of all queries, not of the sample alone
    again, _ = find_nearest(documents, queries, 10, "ivf-pq", wanted)
    assert (found.documents == again.documents).all()
    same = found.documents == exact.documents
    np.testing.assert_allclose(found.distances[same], exact.distances[same], atol=1e-5)


def test_vectors_of_nothing_are_near_to_nothing(vectors):
    documents, queries = vectors[0][:4].copy(), vectors[1][:2]
    documents[[0, 2]] = 0
    found, _ = find_nearest(documents, queries, 3, "flat", 0.97)
    assert np.sort(found.documents, axis=1).tolist() == [[NONE, 1, 3]] * 2
    assert np.isinf(found.distances[:, 2]).all()
    assert find_nearest(documents[:1], queries, 3, "flat", 0.97)[0].documents.tolist() == [[NONE] * 3] * 2


def test_merging_ranges_equals_one_search(vectors):
    documents, queries = vectors
    whole, _ = find_nearest(documents, queries, 10, "flat", 0.97)
    merged = Neighbors.none(len(queries), 10)
    for first in (3000, 0, 1000, 2000):
        content = encode_result(*find_nearest(documents[first : first + 1000], queries, 10, "flat", 0.97))
        found, sample = decode_result(content, len(queries), 10, first)
        assert (sample.documents == found.documents[sample_queries(300)]).all()
        merged = merged.merge(found)
    assert (merged.documents == whole.documents).mean() > 0.999
    np.testing.assert_allclose(merged.distances, whole.distances, atol=1e-5)


def test_equal_distances_go_to_the_lower_document():
    def one(*documents):
        return Neighbors(np.full((1, 2), 0.5, np.float32), np.array([documents], np.int64))

    assert one(7, 9).merge(one(3, 8)).documents.tolist() == one(3, 8).merge(one(7, 9)).documents.tolist() == [[3, 7]]


def test_recall_counts_found_neighbors():
    exact = Neighbors(np.float32([[0.1, 0.2], [0.3, np.inf]]), np.array([[4, 5], [6, NONE]]))
    assert exact.recall(exact) == 1
    half = Neighbors(np.float32([[0.1, 0.9], [0.9, np.inf]]), np.array([[4, 7], [8, NONE]]))
    assert half.recall(exact) == pytest.approx(1 / 3)
    assert Neighbors.none(2, 2).recall(Neighbors.none(2, 2)) == 1
