"""Keyed permutation: a bijection, random, and fixed across versions."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.sampling.permutation import Permutation, derive_key

keys = st.integers(0, 2**64 - 1)


def order(n: int, key: int, places: Iterable[int] | None = None) -> np.ndarray:
    return np.array(list(map(Permutation(n, key), range(n) if places is None else places)))


@given(n=st.integers(1, 20_000) | st.integers(1, 500), key=keys)
def test_is_a_bijection(n, key):
    assert (np.bincount(order(n, key), minlength=n) == 1).all()


def test_is_a_bijection_on_more_than_a_power_of_four():
    n = 16_387  # 4^7 + 3: three of four values are sent through again
    assert np.array_equal(np.sort(order(n, 7)), np.arange(n))


@pytest.mark.parametrize("n", [10**12, 10**15 + 37, 2**62])
def test_large_domains(n):
    places = np.unique(np.random.default_rng(0).integers(0, n, 20_000))
    values = order(n, 3, places.tolist())
    assert len(np.unique(values)) == len(places)
    assert 0 <= values.min() < n // 1000
    assert n - n // 1000 < values.max() < n


def test_a_large_domain_takes_no_memory():
    tracemalloc.start()
    try:
        permutation = Permutation(10**12, 3)
        values = [permutation(i) for i in range(0, 10**12, 10**12 // 100)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(values)) == 100
    assert peak < 16 * 1024


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17])
def test_smallest_domains(n):
    permutation = Permutation(n, 11)
    assert sorted(permutation(i) for i in range(n)) == list(range(n))
    for outside in (-1, n):
        with pytest.raises(IndexError):
            permutation(outside)


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_impossible_sizes(n):
    with pytest.raises(ValueError, match="size must be from 1"):
        Permutation(n, 0)


def test_all_orders_of_four_are_equally_likely():
    num_keys = 4800
    orders = Counter(tuple(order(4, derive_key(key))) for key in range(num_keys))
    expected = num_keys / 24
    chi_square = sum((orders[order] - expected) ** 2 / expected for order in permutations(range(4)))
    assert chi_square < 49.7  # 23 degrees of freedom: exceeded once in 1,000 by a fair draw; the keys are fixed


def test_places_are_spread_evenly():
    # 100 thousand places that follow each other land evenly in 100 bins, and their neighbors land independently
    n = 10**9
    values = order(n, 5, range(100_000))
    counts = np.bincount(values * 100 // n, minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 148.2  # 99 degrees of freedom, once in 1,000
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_keys_give_different_orders():
    first, second = (order(10_000, key) for key in (0, 1))
    assert (first == second).sum() < 10  # one place in n agrees by chance


def test_orders_are_pinned():
    # If these numbers change, every run that is resumed reads other data than it would have: never update them.
    assert derive_key(1234, "web", 0) == 0xDC28169C39FE4423
    assert [Permutation(1000, 42)(i) for i in range(5)] == [919, 244, 447, 148, 19]
    assert [Permutation(10**12, 42)(i) for i in range(2)] == [530493153012, 93016128544]


def test_derive_key_tells_its_parts_apart():
    lots = [(), (1,), ("1",), (-1,), (1, 2), (12,), ("1", "2"), ("12",), ("", "12"), ("12", ""), (2**70,), ("ü",)]
    assert len({derive_key(*parts) for parts in lots}) == len(lots)
    assert all(0 <= derive_key(*parts) < 2**64 for parts in lots)
