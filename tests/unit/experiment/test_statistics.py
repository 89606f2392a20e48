"""Student's t, the paired test and Holm's correction against scipy and printed tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.experiment.paired_test import compare_pairs, holm
from megatron_cpt.law.student_t import quantile, two_sided_p

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 1000])
@pytest.mark.parametrize("t", [0.0, 1e-9, 0.1, 0.7, 1.0, 2.5, 12.7, 300.0, 1e6])
def test_tail_probability_is_scipys(degrees: int, t: float) -> None:
    assert two_sided_p(t, degrees) == pytest.approx(2 * stats.t.sf(t, degrees), rel=1e-9, abs=1e-300)
    assert two_sided_p(-t, degrees) == two_sided_p(t, degrees)


@pytest.mark.parametrize("degrees", [1, 2, 5, 100])
@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.95, 0.999])
def test_quantile_is_scipys(degrees: int, confidence: float) -> None:
    assert quantile(confidence, degrees) == pytest.approx(stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-9)


@given(st.integers(2, 12), st.integers(0, 10**6), st.floats(-0.5, 0.5))
def test_paired_comparison_is_scipys(count: int, seed: int, shift: float) -> None:
    rng = np.random.default_rng(seed)
    own, other = rng.normal(5 + shift, 0.1, count), rng.normal(5, 0.1, count)
    found = compare_pairs(own.tolist(), other.tolist(), 0.9)
    reference = stats.ttest_rel(own, other)
    low, high = reference.confidence_interval(0.9)
    assert found.half_width is not None
    assert found.p == pytest.approx(reference.pvalue, rel=1e-8)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high), rel=1e-8)


def test_equal_values_are_no_difference() -> None:
    found = compare_pairs([5.1, 5.2, 5.3], [5.1, 5.2, 5.3], 0.95)
    assert (found.mean, found.half_width, found.p) == (0.0, 0.0, 1.0)
    rounded = compare_pairs([5.1 + 1e-15, 5.2, 5.3], [5.1, 5.2, 5.3 - 1e-15], 0.95)
    assert (rounded.half_width, rounded.p) == (0.0, 1.0)


def test_one_seed_has_neither_interval_nor_test() -> None:
    found = compare_pairs([5.0], [4.5], 0.95)
    assert (found.num_seeds, found.mean, found.half_width, found.p) == (1, 0.5, None, None)


def test_a_constant_difference_is_certain() -> None:
    assert compare_pairs([2.0, 3.0], [1.0, 2.0], 0.95).p == 0.0


def test_holms_own_procedure() -> None:
    # Reject in order while p_(i) <= alpha / (k - i + 1); this is equal to a corrected p-value of at most alpha.
    rng = np.random.default_rng(0)
    for _ in range(200):
        p_values = rng.uniform(0, 0.1, rng.integers(1, 8)).tolist()
        order = np.argsort(p_values)
        rejected = set()
        for rank, place in enumerate(order):
            if p_values[place] > 0.05 / (len(p_values) - rank):
                break
            rejected.add(place)
        corrected = holm(p_values)
        assert {place for place, p in enumerate(corrected) if p is not None and p <= 0.05} == rejected


def test_holm_ignores_unknown_p_values() -> None:
    assert holm([None, 0.02, None, 0.03]) == [None, 0.04, None, 0.04]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_two_equal_arms_are_rarely_told_apart() -> None:
    # 500 experiments without any true difference: about 5 % of the intervals miss 0.
    rng = np.random.default_rng(1)
    found = [compare_pairs(rng.normal(size=3).tolist(), rng.normal(size=3).tolist(), 0.95) for _ in range(500)]
    assert 10 <= sum(one.p is not None and one.p < 0.05 for one in found) <= 45
