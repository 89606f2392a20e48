"""Sources that end: the blend continues without them from that sample, independent of batches and restarts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config import draft_config
from megatron_cpt.errors import UserError
from megatron_cpt.planning import build_plan
from megatron_cpt.sampling.blend import BlendCursor, PhaseBlend

NAMES = ["web", "code", "qa", "math"]
PHASES = [
    PhaseBlend("general", 0, 60, {"web": 0.5, "code": 0.3, "math": 0.2}),
    PhaseBlend("qa", 60, 90, {"web": 0.25, "code": 0.25, "qa": 0.5}),
]


def by_the_rule(phases: list[PhaseBlend], limits: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Yield source and sample index of every sample by the definition, until all sources have ended."""
    counts, blend, given = dict.fromkeys(NAMES, 0), None, {}
    for sample in range(phases[-1].end_sample):
        phase = next(phase for phase in phases if sample < phase.end_sample)
        left = [n for n in NAMES if n in phase.weights and counts[n] < limits.get(n, 10**9)]
        if not left:
            return
        if blend != (phase.name, left):
            blend, given = (phase.name, left), dict.fromkeys(left, 0)
        total = sum(phase.weights[n] for n in left)
        i = sum(given.values())
        source = max(left, key=lambda n: phase.weights[n] / total * max(i, 1) - given[n])
        yield source, counts[source]
        given[source] += 1
        counts[source] += 1


def walk(cursor: BlendCursor, count: int) -> list[tuple[str, int]]:
    sources, ks = cursor.next(count)
    return [(NAMES[source], k) for source, k in zip(sources.tolist(), ks.tolist(), strict=True)]


@given(
    limits=st.dictionaries(st.sampled_from(["code", "qa", "math"]), st.integers(0, 40)),  # web never ends
    cuts=st.lists(st.integers(0, 150), max_size=8),
)
def test_every_way_to_walk_is_the_definition(limits, cuts):
    expected = list(by_the_rule(PHASES, limits))
    assert len(expected) == 150
    parts = [end - start for start, end in pairwise([0, *sorted(cuts), 150])]
    unbroken = BlendCursor(PHASES, NAMES, limits=limits)
    assert [pair for part in parts for pair in walk(unbroken, part)] == expected
    assert all(unbroken.counts[name] <= limit for name, limit in limits.items())
    state, restarted = BlendCursor(PHASES, NAMES, limits=limits).state_dict(), []
    for part in parts:
        cursor = BlendCursor(PHASES, NAMES, limits=limits)
        cursor.load_state_dict(json.loads(json.dumps(state)))
        restarted += walk(cursor, part)
        state = cursor.state_dict()
    assert restarted == expected


def test_the_others_share_in_proportion():
    cursor = BlendCursor(PHASES, NAMES, limits={"math": 4})
    first = walk(cursor, 60)
    assert sum(name == "math" for name, _ in first) == 4
    end = first.index(("math", 3)) + 1
    after = [name for name, _ in first[end:]]
    assert after.count("web") == pytest.approx(len(after) * 0.5 / 0.8, abs=1)
    assert after.count("code") == pytest.approx(len(after) * 0.3 / 0.8, abs=1)


def test_limits_that_are_not_reached_change_nothing():
    far = dict.fromkeys(NAMES, 1000)
    limited, free = BlendCursor(PHASES, NAMES, limits=far), BlendCursor(PHASES, NAMES)
    assert walk(limited, 150) == walk(free, 150)
    assert limited.state_dict() == free.state_dict()


def test_all_sources_of_a_phase_have_ended():
    limits = {"web": 20, "code": 20, "math": 10}
    expected = list(by_the_rule(PHASES, limits))
    assert len(expected) == 50
    cursor = BlendCursor(PHASES, NAMES, limits=limits)
    assert walk(cursor, 50) == expected
    cursor.load_state_dict(cursor.state_dict())  # a state in which no source is left can be loaded
    with pytest.raises(UserError, match=r"phase general: all its sources have ended .* at sample 50 of the run"):
        cursor.next(1)


def test_a_limit_raised_on_resume_brings_the_source_back_without_a_burst():
    before = BlendCursor(PHASES, NAMES, limits={"math": 2})
    before.next(50)
    after = BlendCursor(PHASES, NAMES, limits={"math": 100})
    after.load_state_dict(before.state_dict())
    pairs = walk(after, 10)
    assert [k for name, k in pairs if name == "math"] == [2, 3]  # a fifth of 10, from where it had stopped
    assert [name for name, _ in pairs] == [name for name, _ in islice(by_the_rule(PHASES, {}), 10)]


@given(
    epochs=st.dictionaries(st.sampled_from(["web", "code", "qa"]), st.floats(0.05, 3), min_size=1, max_size=2),
    weights=st.lists(st.sampled_from([1.0, 0.5, 0.2, 0.05]), min_size=3, max_size=3),
)
def test_the_plan_says_what_the_cursor_does(epochs, weights):
    sources = {name: {"path": name, "tokens": 8_000} for name in ("web", "code", "qa")}
    for name, limit in epochs.items():
        sources[name] |= {"max_epochs": limit, "on_exhausted": "renormalize"}
    blend = dict(zip(sources, weights, strict=True))
    run = {
        "name": "small",
        "output": "runs/small",
        "model": {"preset": "tiny_nemotron"},
        "seq_length": 64,
        "batch": {"global": 8},
        "tokens": 51_200,
        "schedule": {"max_lr": 1e-3},
        "sources": sources,
        "phases": [
            {"name": "one", "blend": blend, "until": {"step": 40}},
            {"name": "two", "blend": {**blend, "web": 3}},
        ],
    }
    plan = build_plan(draft_config(run, []).config, dict.fromkeys(sources, 8_000))
    assert not plan.problems
    assert plan.span_limits == {name: int(limit * 124 + 1e-6) for name, limit in epochs.items()}
    phases = [
        PhaseBlend(phase.name, (phase.first_step - 1) * 8, phase.num_samples, phase.weights) for phase in plan.phases
    ]
    cursor = BlendCursor(phases, list(sources), limits=plan.span_limits)
    for phase in plan.phases:
        before = cursor.counts
        at_end = {}
        for step in range(phase.first_step, phase.last_step + 1):
            cursor.next(8)
            for name, limit in plan.span_limits.items():
                if cursor.counts[name] == limit:
                    at_end.setdefault(name, step)
        read = {name: cursor.counts[name] - before[name] for name in sources}
        assert sum(use.samples for use in phase.sources.values()) == phase.num_samples
        for name, use in phase.sources.items():
            assert use.samples == pytest.approx(read[name], abs=3)  # each piece of a phase is rounded by itself
        for name, step in phase.ends.items():
            rarity = 1 / phase.weights[name] / 8  # steps per sample of it
            assert at_end.get(name, phase.last_step) == pytest.approx(step, abs=2 + 2 * rarity)
