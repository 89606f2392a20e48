"""First and last steps of phases, and the samples they read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config import draft_config
from megatron_cpt.planning import build_plan
from megatron_cpt.planning.timeline.epochs import normalize, samples_in_epoch, split_samples

SIZES = {"web": 1_000_000, "code": 500_000, "qa": 20_000}


def plan(data, *overrides):
    draft = draft_config(data, overrides)
    assert draft.problems == []
    return build_plan(draft.config, SIZES)


def texts(found) -> list[str]:
    return [problem.text for problem in found.problems]


@pytest.mark.parametrize(
    ("until", "last"),
    [
        ("{step: 30}", 30),
        ("{tokens: 15360}", 30),  # 30 x 512
        ("{tokens: 15361}", 31),
        ("{tokens: 1}", 1),
        ("{lr: 0.2}", 72),
    ],
)
def test_the_three_ways_to_end(run_data, until, last):
    found = plan(run_data, f"phases.general.until={until}", "sources.qa.max_epochs=")
    assert texts(found) == []
    first, second = found.phases
    assert (first.first_step, first.last_step, second.first_step, second.last_step) == (1, last, last + 1, 100)
    assert first.lr_first == 1e-3
    assert first.lr_last == found.schedule.rate(last)
    assert second.lr_first == found.schedule.rate(last + 1)


def test_until_lr_ends_with_the_last_step_above_it(run_data):
    found = plan(run_data)
    assert found.phases[0].lr_last > 0.2e-3 >= found.phases[1].lr_first


def test_until_lr_looks_behind_the_peak_of_a_warm_up(run_data):
    found = plan(run_data, "schedule.warmup=20")
    assert found.schedule.rate(1) == 0.0
    assert 20 < found.phases[0].last_step < 100
    assert found.phases[0].lr_last > 0.2e-3 >= found.phases[1].lr_first


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["phases.general.until={step: 100}"],
            "step: 100 is step 100, but the run ends with step 100, so the next phase has no step",
        ),
        (["phases.general.until={step: 500}"], "step: 500 is step 500, but the run ends with step 100"),
        (["phases.general.until={tokens: 1M}"], "tokens: 1M is step 1,954, but the run ends with step 100"),
        (
            ["phases.general.until={lr: 0.005}"],
            "lr: 0.005 of max_lr is never reached: the last step runs at 0.0102 of it",
        ),
        (["schedule.shape=constant"], "lr: 0.2 of max_lr is never reached: the last step runs at 1 of it"),
    ],
)
def test_phases_that_leave_nothing_for_the_next(run_data, overrides, text):
    (problem,) = texts(plan(run_data, *overrides))
    assert problem.startswith("phases[0].until (phase general): ")
    assert text in problem


def test_a_phase_that_ends_before_it_begins(run_data):
    run_data["phases"].insert(1, {"name": "middle", "blend": {"web": 1}, "until": {"step": 40}})
    (problem,) = texts(plan(run_data))
    assert problem.startswith(
        "phases[1].until (phase middle): step: 40 is step 40, but the previous phase ends with step 72"
    )
    run_data["phases"][1]["until"] = {"step": 72}
    assert len(texts(plan(run_data))) == 1
    run_data["phases"][1]["until"] = {"step": 73}
    found = plan(run_data)
    assert texts(found) == []
    assert [(phase.first_step, phase.last_step) for phase in found.phases] == [(1, 72), (73, 73), (74, 100)]


def test_several_wrong_phases_are_all_reported(run_data):
    run_data["phases"].insert(1, {"name": "middle", "blend": {"web": 1}, "until": {"step": 40}})
    run_data["phases"].insert(2, {"name": "late", "blend": {"web": 1}, "until": {"tokens": "1B"}})
    assert len(texts(plan(run_data))) == 2


@given(
    steps=st.integers(1, 400),
    batch=st.integers(1, 64),
    ends=st.lists(st.floats(0.0, 1.0), max_size=4),
    shape=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
)
def test_phases_tile_the_run(steps, batch, ends, shape):
    tokens_per_step = batch * 16
    cuts = sorted({round(end * steps) for end in ends} - {0, steps})
    phases = [
        {"name": f"p{n}", "blend": {"web": n + 1, "code": 1}, "until": {"step": cut}} for n, cut in enumerate(cuts)
    ]
    data = {
        "name": "x",
        "output": "x",
        "model": "tiny_llama",
        "seq_length": 16,
        "batch": {"global": batch},
        "tokens": steps * tokens_per_step,
        "schedule": {"shape": shape, "max_lr": 1e-3, "decay": {"steps": max(1, steps // 2)}},
        "sources": {"web": {"path": "w"}, "code": {"path": "c"}},
        "phases": [*phases, {"name": "last", "blend": {"web": 1}}],
    }
    found = build_plan(draft_config(data).config, {"web": 10_000, "code": 500})
    assert texts(found) == []
    covered = [step for phase in found.phases for step in range(phase.first_step, phase.last_step + 1)]
    assert covered == list(range(1, steps + 1))
    for phase in found.phases:
        assert found.phase_of(phase.first_step) is phase
        assert found.phase_of(phase.last_step) is phase
        assert sum(use.samples for use in phase.sources.values()) == phase.num_samples == phase.num_steps * batch
        assert sum(phase.weights.values()) == pytest.approx(1, abs=1e-12)
        assert phase.tokens == phase.num_steps * tokens_per_step
    assert sum(total.tokens for total in found.sources.values()) == found.tokens_trained == found.tokens


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.integers(0, 10**9))
def test_samples_are_shared_out_by_weight(weights, samples):
    shares = normalize({f"s{n}": weight for n, weight in enumerate(weights)})
    counts = split_samples(shares, samples)
    assert sum(counts.values()) == samples
    assert all(abs(counts[name] - share * samples) < 1 + 1e-6 for name, share in shares.items())


def test_largest_remainders_come_first():
    assert split_samples({"a": 0.5, "b": 0.26, "c": 0.24}, 10) == {"a": 5, "b": 3, "c": 2}
    assert split_samples({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 10) == {"a": 4, "b": 3, "c": 3}


def test_weights_may_have_any_size():
    assert normalize({"a": 1e308, "b": 1e308}) == {"a": 0.5, "b": 0.5}
    assert normalize({"a": 3, "b": 1}) == {"a": 0.75, "b": 0.25}
    assert normalize({}) == {}


@pytest.mark.parametrize(("tokens", "samples"), [(0, 0), (1, 0), (64, 0), (65, 1), (128, 1), (129, 2)])
def test_a_sample_needs_one_token_more(tokens, samples):
    assert samples_in_epoch(tokens, 64) == samples
