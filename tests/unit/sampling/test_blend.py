"""Blend: equal to megatron-core's for every sample, close to its weights, and independent of batches and restarts."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.errors import RefusedError
from megatron_cpt.sampling.blend import BlendCursor, PhaseBlend, assign

weight_lists = st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=40) | st.lists(
    st.sampled_from([1.0, 0.5, 0.25, 0.1]),
    min_size=1,
    max_size=40,  # many ties
)


def normalized(weights) -> np.ndarray:
    array = np.array(weights, np.float64)
    return array / array.sum()


def by_megatron_core(weights: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp")
    sources, ks = np.zeros(count, np.int16), np.zeros(count, np.int64)
    helpers.build_blending_indices(sources, ks, weights, len(weights), count, False)
    return sources.tolist(), ks.tolist()


def by_the_rule(weights: np.ndarray, count: int) -> list[int]:
    given, chosen = [0] * len(weights), []
    for i in range(count):
        behind = [float(weight) * max(i, 1) - had for weight, had in zip(weights, given, strict=True)]
        chosen.append(behind.index(max(behind)))
        given[chosen[-1]] += 1
    return chosen


@given(weights=weight_lists, count=st.integers(0, 400))
def test_equals_megatron_core(weights, count):
    weights = normalized(weights)
    given = np.zeros(len(weights), np.int64)
    sources = assign(weights, given, count)
    assert sources.tolist() == by_megatron_core(weights, count)[0] == by_the_rule(weights, count)
    assert given.tolist() == np.bincount(sources, minlength=len(weights)).tolist()


@pytest.mark.parametrize(("num_sources", "count"), [(8, 50_000), (1000, 20_000)])
def test_equals_megatron_core_over_a_long_run(num_sources, count):
    weights = np.random.default_rng(num_sources).dirichlet(np.ones(num_sources))
    names = [f"s{i}" for i in range(num_sources)]
    cursor = BlendCursor([PhaseBlend("only", 0, count, dict(zip(names, weights.tolist(), strict=True)))], names)
    sources, ks = cursor.next(count)
    their_sources, their_ks = by_megatron_core(weights, count)
    assert sources.tolist() == their_sources
    assert ks.tolist() == their_ks


def furthest_ahead_and_behind(weights: np.ndarray, count: int) -> tuple[float, float]:
    """Return how far any source ever is ahead of its share and behind it, in samples."""
    chosen = assign(weights, np.zeros(len(weights), np.int64), count)
    given = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    behind = weights * np.arange(1, count + 1)[:, None] - given
    return -float(behind.min()), float(behind.max())


skewed_weight_lists = st.lists(
    st.tuples(st.floats(0, 9).map(lambda x: np.exp(-x)), st.integers(1, 12)), min_size=1, max_size=5
).map(lambda groups: [weight for weight, repeats in groups for _ in range(repeats)])


@given(weights=weight_lists | skewed_weight_lists)
def test_stays_with_its_weights_at_every_sample(weights):
    # docs/internals/decisions.md has the proof
    ahead, behind = furthest_ahead_and_behind(normalized(weights), 600)
    assert ahead < 1 + 1e-9
    assert behind <= sum(1 / k for k in range(1, len(weights))) + 1e-9


def test_may_fall_more_than_two_behind_but_not_by_much():
    # found by a search: a heavy source, and light ones in levels that become due one after another
    weights = normalized([0.868] + [0.032] * 3 + [0.004] * 6 + [0.000875] * 14)
    ahead, behind = furthest_ahead_and_behind(weights, 4000)
    assert ahead < 1
    assert 2.3 < behind < 2.5
    assert by_megatron_core(weights, 4000)[0] == assign(weights, np.zeros(24, np.int64), 4000).tolist()


def test_two_equal_sources_alternate_from_the_first():
    assert assign(np.array([0.5, 0.5]), np.zeros(2, np.int64), 6).tolist() == [0, 1, 0, 1, 0, 1]


@given(weights=weight_lists, cuts=st.lists(st.integers(0, 200), max_size=6))
def test_assigning_in_parts_changes_nothing(weights, cuts):
    weights, given = normalized(weights), np.zeros(len(weights), np.int64)
    edges = [0, *sorted(cuts), 200]
    parts = [assign(weights, given, end - start) for start, end in pairwise(edges)]
    assert np.concatenate(parts).tolist() == by_the_rule(weights, 200)


NAMES = ["web", "code", "qa"]
GENERAL = PhaseBlend("general", 0, 60, {"web": 0.6, "code": 0.4})
QA = PhaseBlend("qa", 60, 40, {"web": 0.5, "code": 0.4, "qa": 0.1})


def walk(cursor: BlendCursor, *counts: int) -> list[tuple[int, int]]:
    pairs = []
    for count in counts:
        sources, ks = cursor.next(count)
        assert sources.dtype == ks.dtype == np.int64
        pairs += list(zip(sources.tolist(), ks.tolist(), strict=True))
    return pairs


class TestCursor:
    def test_cursors_go_on_over_a_phase_change(self):
        cursor = BlendCursor([GENERAL, QA], NAMES)
        pairs = walk(cursor, 100)
        for source in range(3):
            ks = [k for s, k in pairs if s == source]
            assert ks == list(range(len(ks)))  # each sample of a source once, in order, over both phases
        assert [s for s, _ in pairs[:60]] == by_the_rule(np.array([0.6, 0.4]), 60)
        assert [s for s, _ in pairs[60:]] == by_the_rule(np.array([0.5, 0.4, 0.1]), 40)
        assert cursor.counts == {"web": 56, "code": 40, "qa": 4}
        assert cursor.remaining == 0

    @given(cuts=st.lists(st.integers(0, 100), max_size=8))
    def test_batches_and_restarts_change_nothing(self, cuts):
        whole = walk(BlendCursor([GENERAL, QA], NAMES), 100)
        edges = [0, *sorted(cuts), 100]
        parts = [end - start for start, end in pairwise(edges)]
        assert walk(BlendCursor([GENERAL, QA], NAMES), *parts) == whole  # a part may straddle the phases
        state, pairs = BlendCursor([GENERAL, QA], NAMES).state_dict(), []
        for part in parts:
            cursor = BlendCursor([GENERAL, QA], NAMES)
            cursor.load_state_dict(json.loads(json.dumps(state)))
            pairs += walk(cursor, part)
            state = cursor.state_dict()
        assert pairs == whole

    def test_restart_where_a_phase_of_the_same_weights_begins(self):
        weights = {"web": 0.7, "code": 0.3}
        phases = [PhaseBlend("one", 0, 8, weights), PhaseBlend("two", 8, 20, weights)]
        whole = walk(BlendCursor(phases, NAMES), 28)
        cursor = BlendCursor(phases, NAMES)
        cursor.load_state_dict(state_after(8, phases))
        assert walk(cursor, 20) == whole[8:]

    def test_asking_beyond_the_end(self):
        cursor = BlendCursor([GENERAL], NAMES)
        with pytest.raises(AssertionError, match="61 samples requested, 60 left"):
            cursor.next(61)

    def test_a_source_outside_of_the_phase_gets_nothing(self):
        cursor = BlendCursor([GENERAL, QA], NAMES)
        cursor.next(60)
        assert cursor.counts["qa"] == 0

    def test_order_of_the_phases_keys_does_not_matter(self):
        turned = PhaseBlend("general", 0, 60, {"code": 0.4, "web": 0.6})
        assert walk(BlendCursor([turned], NAMES), 60) == walk(BlendCursor([GENERAL], NAMES), 60)

    @pytest.mark.parametrize(
        "phases",
        [
            [],
            [QA],
            [GENERAL, GENERAL],
            [GENERAL, PhaseBlend("late", 61, 5, {"web": 1.0})],
            [PhaseBlend("p", 0, 5, {"books": 1.0})],
            [PhaseBlend("p", 0, 5, {"web": 1.0, "code": 0.0})],
            [PhaseBlend("p", 0, 5, {"web": 0.5, "code": 0.6})],
        ],
    )
    def test_plans_that_cannot_be(self, phases):
        with pytest.raises(AssertionError):
            BlendCursor(phases, NAMES)


def state_after(count: int, phases=(GENERAL, QA), names=NAMES) -> dict:
    cursor = BlendCursor(phases, names)
    cursor.next(count)
    return cursor.state_dict()


class TestResumeUnderAnotherPlan:
    def test_a_new_source_starts_at_its_first_sample(self):
        state = state_after(30, [GENERAL], ["web", "code"])
        cursor = BlendCursor(
            [PhaseBlend("general", 0, 30, {"web": 0.6, "code": 0.4}), PhaseBlend("more", 30, 10, {"qa": 1.0})], NAMES
        )
        cursor.load_state_dict(state)
        assert walk(cursor, 10) == [(2, k) for k in range(10)]
        assert cursor.counts == {"web": 18, "code": 12, "qa": 10}

    def test_new_weights_count_from_now_on(self):
        cursor = BlendCursor([PhaseBlend("general", 0, 60, {"web": 0.1, "code": 0.9})], NAMES)
        cursor.load_state_dict(state_after(30))
        pairs = walk(cursor, 30)
        assert [s for s, _ in pairs] == by_the_rule(np.array([0.1, 0.9]), 30)  # no burst to make up for the past
        assert min(k for s, k in pairs if s == 0) == 18
        assert min(k for s, k in pairs if s == 1) == 12

    def test_changed_blend_survives_another_restart(self):
        changed = [PhaseBlend("general", 0, 60, {"web": 0.1, "code": 0.9})]
        whole = BlendCursor(changed, NAMES)
        whole.load_state_dict(state_after(30))
        expected = walk(whole, 30)
        first = BlendCursor(changed, NAMES)
        first.load_state_dict(state_after(30))
        pairs = walk(first, 11)
        second = BlendCursor(changed, NAMES)
        second.load_state_dict(first.state_dict())
        assert pairs + walk(second, 19) == expected

    def test_a_longer_phase_goes_on_as_if_it_had_always_been(self):
        longer = [PhaseBlend("general", 0, 90, GENERAL.weights)]
        cursor = BlendCursor(longer, NAMES)
        cursor.load_state_dict(state_after(60, [GENERAL]))  # saved with the last step of the shorter run
        assert walk(cursor, 30) == walk(BlendCursor(longer, NAMES), 90)[60:]

    def test_a_removed_source_keeps_its_count(self):
        state = state_after(100)
        cursor = BlendCursor([PhaseBlend("rest", 0, 120, {"web": 1.0})], ["web"])
        cursor.load_state_dict(state)
        assert walk(cursor, 20) == [(0, 56 + k) for k in range(20)]
        assert cursor.counts == {"web": 76, "code": 40, "qa": 4}
        back = BlendCursor([PhaseBlend("back", 0, 130, {"qa": 1.0})], NAMES)
        back.load_state_dict(cursor.state_dict())
        assert walk(back, 2) == [(2, 4), (2, 5)]

    @pytest.mark.parametrize(
        "damage", [{"sample": 31}, {"counts": {"web": 31, "code": -1}}, {"counts_at_blend_start": {"web": 19}}]
    )
    def test_a_state_that_contradicts_itself(self, damage):
        with pytest.raises(RefusedError, match="data state"):
            BlendCursor([GENERAL, QA], NAMES).load_state_dict(state_after(30) | damage)
