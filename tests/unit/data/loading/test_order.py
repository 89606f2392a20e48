"""Global order of samples: equal for any ranks, micro-batches and restarts, even if the blend changes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data.loading.loader import Loader, StepData
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.sampling.blend import BlendCursor, PhaseBlend

S, GLOBAL = 8, 12
NAMES = ["web", "code", "qa"]
DIVISIONS = [(dp, micro) for dp in (1, 2, 3, 4) for micro in (1, 2, 3, 6, 12) if GLOBAL % (dp * micro) == 0]
Blends = tuple[dict[str, float], dict[str, float]]  # of the first and of the second phase
PlanRecord = tuple[int, tuple[int, int], Blends]  # steps, (data-parallel size, micro-batch), blends from there on


@pytest.fixture(scope="module")
def streams(tmp_path_factory, write_pair) -> list[TokenStream]:
    """Sources of 40, 9 and 5 samples per epoch, so that a run has several epochs; each token value is unique."""
    folder = tmp_path_factory.mktemp("order")
    lengths = {"web": [200, 130], "code": [80], "qa": [45]}
    return [
        TokenStream(
            name,
            [
                write_pair(folder / f"{name}{i}", [range(first := 10_000 * number + 1000 * i, first + length)], "<i4")
                for i, length in enumerate(lengths[name])
            ],
            seq_length=S,
            seed=5,
        )
        for number, name in enumerate(NAMES)
    ]


@st.composite
def blends(draw: st.DrawFn) -> Blends:
    def one() -> dict[str, float]:
        weights = draw(st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=3, max_size=3).filter(any))
        return {name: weight / sum(weights) for name, weight in zip(NAMES, weights, strict=True) if weight}

    return one(), one()


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[PlanRecord]]:
    """Draw the first step of the second phase, and the segments between restarts; some change the blends."""
    segments: list[PlanRecord] = []
    for _ in range(draw(st.integers(1, 4))):
        changes = not segments or draw(st.booleans())
        in_force = draw(blends()) if changes else segments[-1][2]
        segments.append((draw(st.integers(1, 3)), draw(st.sampled_from(DIVISIONS)), in_force))
    return draw(st.integers(0, sum(steps for steps, _, _ in segments))), segments


def phases_of(switch: int, steps: int, blends: Blends) -> list[PhaseBlend]:
    lengths = (switch * GLOBAL, (steps - switch) * GLOBAL)
    return [
        PhaseBlend("first", 0, lengths[0], blends[0]),
        PhaseBlend("second", lengths[0], lengths[1], blends[1]),
    ]


def by_the_rule(switch: int, segments: list[PlanRecord]) -> Iterator[tuple[str, int]]:
    """Return source and sample index of every sample of the run by the definition, in plain arithmetic."""
    counts = dict.fromkeys(NAMES, 0)
    blend, given = None, {}
    first = 0
    for steps, _, in_force in segments:
        for step in range(first, first + steps):
            phase = int(step >= switch)
            if blend != (phase, in_force[phase]):  # another blend: its shares count from here
                blend, given = (phase, in_force[phase]), {name: 0 for name in NAMES if name in in_force[phase]}
            for _ in range(GLOBAL):
                i = sum(given.values())
                source = max(given, key=lambda name: blend[1][name] * max(i, 1) - given[name])
                yield source, counts[source]
                given[source] += 1
                counts[source] += 1
        first += steps


def load(
    streams: list[TokenStream], phases: list[PhaseBlend], state: str | None, steps: int, **division: int
) -> list[StepData]:
    cursor = BlendCursor(phases, NAMES)
    if state is not None:
        cursor.load_state_dict(json.loads(state))
    with Loader(streams, cursor, global_batch=GLOBAL, **division) as loader:
        return [loader.next_step() for _ in range(steps)]


def in_global_order(ranks: list[list[StepData]]) -> Iterator[list[int]]:
    """Return all samples of all ranks, ordered by step, micro-batch and rank."""
    for steps in zip(*ranks, strict=True):
        for batches in zip(*(step.micro_batches for step in steps), strict=True):
            for batch in batches:
                yield from np.concatenate([batch.tokens, batch.labels[:, -1:]], axis=1).tolist()


@given(run=runs())
def test_any_division_restart_and_change_of_blend_reads_the_same_order(streams, run):
    switch, segments = run
    total = sum(steps for steps, _, _ in segments)
    seen: list[list[int]] = []
    state = None
    for steps, (size, micro), in_force in segments:
        phases = phases_of(switch, total, in_force)
        ranks = [
            load(
                streams, phases, state, steps, data_parallel_rank=rank, data_parallel_size=size,
                micro_batch=micro, prefetch=1 + rank,
            )
            for rank in range(size)
        ]  # fmt: skip
        seen += in_global_order(ranks)
        states = {json.dumps(rank[-1].state) for rank in ranks}
        assert len(states) == 1
        state = states.pop()
    expected = [streams[NAMES.index(source)].read(k).tolist() for source, k in by_the_rule(switch, segments)]
    assert seen == expected
