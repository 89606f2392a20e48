"""Steps of several shapes: batch ramp-up, and phases with their own batch and sequence length."""

from __future__ import annotations

import io
import itertools
import json
import time
from bisect import bisect_left
from collections.abc import Callable

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_cpt.config import RunConfig, draft_config
from megatron_cpt.planning import RunPlan, Schedule, build_plan
from megatron_cpt.planning.timeline import solve_steps
from megatron_cpt.planning.timeline.segments import batch_size, split_into_segments
from megatron_cpt.views.plan_plot import plot_plan
from megatron_cpt.views.plan_table import render_plan

SIZES = {"web": 1_000_000, "code": 500_000, "qa": 20_000}
RAMP = "batch.ramp_up={start: 2, increment: 2, samples: 100}"


def plan(data, *overrides, **options) -> RunPlan:
    draft = draft_config(data, overrides)
    assert draft.problems == []
    return build_plan(draft.config, options.pop("sizes", SIZES), **options)


def texts(found: RunPlan) -> list[str]:
    return [problem.text for problem in found.problems]


def test_the_ramp_of_the_recipes_pretraining():
    """Grow from 384 to 1,152 by 96 over the first 5% of 8T tokens."""
    ramp = {"start": 384, "increment": 96, "samples": "97_656_250"}  # 400B / 4,096
    data = {
        "name": "x",
        "output": "x",
        "model": "nemotron4_15b",
        "seq_length": 4096,
        "batch": {"global": 1152, "ramp_up": ramp},
        "tokens": "8T",
        "schedule": {"max_lr": 4.5e-4, "min_lr": 4.5e-5, "warmup": "16B"},
        "sources": {"web": {"path": "web"}},
        "phases": [{"name": "only", "blend": {"web": 1}}],
    }
    started = time.perf_counter()
    found = build_plan(draft_config(data).config, {})
    assert time.perf_counter() - started < 0.5
    assert [segment.global_batch for segment in found.segments] == list(range(384, 1153, 96))
    assert found.schedule.warmup_steps == -(-16_000_000_000 // (384 * 4096))  # over before the batch grows
    assert found.ramp[0].last_step == -(-97_656_250 // 8 // 384) == 31_790
    rest = 8_000_000_000_000 - found.ramp[-1].end.tokens
    assert found.steps == found.ramp[-1].last_step + -(-rest // (1152 * 4096))


def simulate(config: RunConfig, schedule: Schedule) -> list[tuple[str, int, int]]:
    """Return phase, batch and sequence length of each step, computed step by step."""
    sizes = itertools.repeat(config.batch.global_)
    samples = tokens = 0
    steps, remaining = [], list(config.phases)
    for step in range(1, schedule.steps + 1):
        while len(remaining) > 1 and _is_over(remaining[0].until, schedule, step, tokens):
            remaining.pop(0)
        phase = remaining[0]
        own = phase.batch.global_ if phase.batch else None
        if own is None and config.batch.ramp_up is not None:
            size = batch_size(config.batch, samples)
        else:
            size = own or next(sizes)
        length = phase.seq_length or config.seq_length
        steps.append((phase.name, size, length))
        samples, tokens = samples + size, tokens + size * length
    return steps


def _is_over(until, schedule: Schedule, step: int, tokens: int) -> bool:
    if until.lr is not None:
        return step > schedule.warmup_steps + 1 and schedule.rate(step) <= until.lr * schedule.max_lr
    return step > until.step if until.step is not None else tokens >= until.tokens


def tokens_of(steps: list[tuple[str, int, int]]) -> int:
    return sum(size * length for _, size, length in steps)


UNTIL = st.one_of(
    st.fixed_dictionaries({"lr": st.floats(0.05, 0.95)}),
    st.fixed_dictionaries({"tokens": st.integers(1, 4000)}),
    st.fixed_dictionaries({"step": st.integers(1, 40)}),
)


RUNS = {
    "ramp": st.none()
    | st.fixed_dictionaries({"start": st.just(2), "increment": st.just(3), "samples": st.integers(1, 90)}),
    "untils": st.lists(UNTIL, max_size=2),
    "shapes": st.lists(
        st.tuples(st.sampled_from([None, 4, 8, 16]), st.sampled_from([None, 1, 5])), min_size=3, max_size=3
    ),
    "tokens": st.integers(1, 6000),
    "warmup": st.sampled_from([0, 3, 0.3, "500"]),
    "shape": st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    "decay": st.sampled_from([5, 0.25, "700.0"]),
}


def run_of(ramp, untils, shapes, tokens, warmup, shape, decay) -> RunConfig:
    phases = [
        {"name": f"p{n}", "blend": {"web": 1}, "seq_length": length, "batch": {"global": size}}
        for n, (length, size) in enumerate(shapes[: len(untils) + 1])
    ]
    for phase, until in zip(phases, untils, strict=False):
        phase["until"] = until
    data = {
        "name": "x",
        "output": "x",
        "model": "tiny_llama",
        "seq_length": 8,
        "batch": {"global": 11, "ramp_up": ramp},
        "tokens": tokens,
        "schedule": {
            "shape": shape,
            "max_lr": 1e-3,
            "warmup": {"tokens": 500} if warmup == "500" else warmup,
            "decay": {"tokens": 700} if decay == "700.0" else decay,
        },
        "sources": {"web": {"path": "web"}},
        "phases": phases,
    }
    config = draft_config(data).config
    assert config is not None
    return config


@given(**RUNS)
@example(None, [{"lr": 0.5}], [(None, None)] * 3, 1, 0, "wsd", 5)  # a decay longer than the run: its first step counts
def test_the_plan_equals_a_simulation_step_by_step(ramp, untils, shapes, tokens, warmup, shape, decay):
    config = run_of(ramp, untils, shapes, tokens, warmup, shape, decay)
    found = build_plan(config, {})
    walked = simulate(config, found.schedule)
    assert tokens_of(walked) >= tokens  # enough steps
    planned = [
        (phase.name, segment.global_batch, segment.seq_length)
        for phase in found.phases
        for segment in phase.segments
        for _ in range(segment.first_step, segment.last_step + 1)
    ]
    if not any("is step" in text for text in texts(found)):  # an `until` before the phase begins has no step
        assert planned == walked
    assert found.tokens_trained == sum(phase.tokens for phase in found.phases)
    schedule = found.schedule
    if warmup == "500" and schedule.warmup_steps < schedule.steps:
        assert tokens_of(walked[: schedule.warmup_steps]) >= 500 > tokens_of(walked[: schedule.warmup_steps - 1])
    if shape == "wsd" and decay == "700.0" and schedule.decay_steps < schedule.steps:
        assert tokens_of(walked[schedule.steps - schedule.decay_steps :]) >= 700


def bisect(target: int, most: int, value: Callable[[int], int]) -> int:
    """Return what `smallest_reaching` should return, for values that do not decrease, as it requires.

    A decay in tokens may break that: a longer decay moves the end of a phase `until: {lr: 0.5}` forward, and with it
    steps of another size into or out of the decay. Then "the smallest" depends on the order of the trials.
    """
    values = [value(n) for n in range(1, most + 1)]
    assume(values == sorted(values))
    return min(most, 1 + bisect_left(values, target))


@given(**RUNS)
def test_a_run_is_as_long_as_bisection_finds(ramp, untils, shapes, tokens, warmup, shape, decay):
    config = run_of(ramp, untils, shapes, tokens, warmup, shape, decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve_steps, "smallest_reaching", bisect)
        expected = solve_steps.solve_schedule(config)
    assert solve_steps.solve_schedule(config) == expected


@given(st.lists(st.integers(0, 50) | st.integers(0, 10**12), min_size=1, max_size=300), st.integers(1, 10**13))
def test_smallest_reaching(steps, target):
    values, layouts = [0, *itertools.accumulate(steps)], []

    def value(n: int) -> int:
        layouts.append(n)
        return values[n]

    assert solve_steps.smallest_reaching(target, len(steps), value) == bisect(target, len(steps), values.__getitem__)
    assert len(layouts) == len(set(layouts)) <= 1 + 3 * len(steps).bit_length()


def test_a_thousand_sizes_and_a_decay_in_tokens_take_few_layouts(run_data, monkeypatch):
    """Expect about fifty layouts of the run, where nested bisection would need hundreds."""
    layouts = 0

    def counted(config: RunConfig, schedule: Schedule):
        nonlocal layouts
        layouts += 1
        return split_into_segments(config, schedule)

    monkeypatch.setattr(solve_steps, "split_into_segments", counted)
    found = plan(
        run_data,
        "batch={global: 1024, micro: 1, ramp_up: {start: 1, increment: 1, samples: 1M}}",
        "tokens=2B",
        "schedule={shape: wsd, max_lr: 1e-3, decay: 200M}",
        "phases.general.until={lr: 0.5}",
        "sources.qa.max_epochs=",
    )
    assert len(found.segments) > 1000
    assert layouts < 60


@pytest.mark.parametrize("until", ["{lr: 0.2}", "{lr: 0.7}", "{tokens: 30K}", "{step: 45}"])
@pytest.mark.parametrize("overrides", [[RAMP], ["phases.qa.seq_length=256", "phases.qa.batch={global: 4, micro: 1}"]])
def test_steps_are_the_fewest_that_reach_the_tokens(run_data, until, overrides):
    overrides = [f"phases.general.until={until}", "sources.qa.max_epochs=", *overrides]
    found = plan(run_data, *overrides)
    assert texts(found) == []
    config = draft_config(run_data, overrides).config
    shorter = Schedule.resolve(config.schedule, found.steps - 1, 1)
    assert tokens_of(simulate(config, shorter)) < config.tokens <= found.tokens_trained


def test_a_single_shape_needs_no_search(run_data):
    found = plan(run_data)
    again = plan(run_data, "phases.general.seq_length=64", "phases.qa.batch={global: 8}")
    assert found.is_uniform
    assert found.to_dict() == again.to_dict()
    assert found.steps == 100
    assert found.tokens_per_step * found.steps == found.tokens_trained
    assert plan(run_data, "tokens=51201").steps == 101


def test_a_longer_phase(run_data):
    found = plan(
        run_data, "phases.qa.seq_length=256", "phases.qa.batch={global: 2, micro: 1}", "model.max_positions=128"
    )
    assert texts(found) == []
    general, qa = found.phases
    assert (general.seq_length, qa.seq_length) == (64, 256)
    assert qa.segments[0].tokens_per_step == 512  # the tokens of a step stay
    assert found.steps == 100
    assert qa.first_sample == 72 * 8
    assert qa.num_samples == 28 * 2
    assert qa.sources["qa"].tokens == 256 * qa.sources["qa"].samples
    assert found.sources["qa"].spans_per_epoch == 19_999 // 256
    assert found.sources["web"].span_length == 256
    assert found.sources["web"].epochs * 3906 == pytest.approx(346 / 4 + 28, abs=61)  # a window of 61 spans at most
    assert any("sequences of 256 tokens have positions beyond" in text for text in found.warnings)


def test_flops_and_memory_of_the_longest(run_data):
    short, long = plan(run_data), plan(run_data, "seq_length=256", "batch.global=2", "batch.micro=1")
    mixed = plan(run_data, "phases.qa.seq_length=256", "phases.qa.batch={global: 2, micro: 1}")
    share = mixed.phases[1].tokens / mixed.tokens_trained
    assert mixed.flops.full == pytest.approx((1 - share) * short.flops.full + share * long.flops.full)
    assert mixed.memory.total == max(short.memory.total, long.memory.total)


def test_a_source_in_shorter_phases_only_keeps_its_own_spans(run_data):
    found = plan(run_data, "phases.general.blend.math=1", "sources.math={path: math}", "phases.qa.seq_length=256",
                 "phases.qa.batch.global=2", sizes=SIZES | {"math": 6_400})  # fmt: skip
    assert found.sources["math"].span_length == 64
    assert found.sources["web"].span_length == 256


@pytest.mark.parametrize(
    ("overrides", "gpus", "text"),
    [
        (
            [RAMP],
            4,
            "phase general: the batch of 2, 4, 6 does not divide into micro-batches of 2 on 4 replicas (4 ranks",
        ),
        (["phases.qa.batch={global: 6}"], 2, "phase qa: the batch of 6 does not divide into micro-batches of 2 on 2"),
        ([RAMP, "phases.general.batch={micro: 4}"], 1, "phase general: the batch of 2, 6 does not divide into"),
        (
            [
                "phases.qa.batch={global: 16, micro: 4}",
                "parallel={pipeline: 2, virtual_pipeline: 2}",
                "batch.global=16",
            ],
            8,
            "of 4 on 4 replicas (8 ranks of 2 each), a multiple of parallel.pipeline: 2 on each",
        ),
    ],
)
def test_batches_that_do_not_divide(run_data, overrides, gpus, text):
    (problem,) = texts(plan(run_data, *overrides, num_gpus=gpus))
    assert text in problem


def test_a_ramp_that_the_run_does_not_finish(run_data):
    found = plan(run_data, "batch.ramp_up={start: 2, increment: 2, samples: 10K}", "sources.qa.max_epochs=")
    assert found.ramp == found.segments
    assert any("batch.ramp_up: the run ends with a batch of " in text for text in found.warnings)
    assert not any("batch.ramp_up" in text for text in plan(run_data, RAMP).warnings)


def test_a_size_shared_by_two_phases_is_listed_once(run_data):
    stream = io.StringIO()
    render_plan(plan(run_data, RAMP, "phases.general.until={step: 5}", "sources.qa.max_epochs="), stream)
    assert "batch ramp  batches of 2, 4, 6 until step 31," in stream.getvalue()


def test_what_is_printed(run_data, tmp_path):
    found = plan(run_data, RAMP, "phases.qa.seq_length=256", "phases.qa.batch={global: 2}")
    stream = io.StringIO()
    render_plan(found, stream)
    lines = stream.getvalue().splitlines()
    assert "batch ramp  batches of 2, 4, 6 until step 31, the end of 100 samples and 6.4K tokens" in lines
    (general,) = (line.split() for line in lines if line.startswith(" general ") and "2 - 8" in line)
    assert general[-4:] == ["2", "-", "8", "64"]
    (qa,) = (line.split() for line in lines if line.startswith(" qa ") and line.endswith("256"))
    assert qa[-2:] == ["2", "256"]
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["phases"][0]["stretches"][0] == {
        "first_step": 1,
        "last_step": 17,
        "first_sample": 0,
        "first_token": 0,
        "global_batch": 2,
        "micro_batch": 2,
        "seq_length": 64,
        "is_ramp": True,
    }
    plot_plan(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
