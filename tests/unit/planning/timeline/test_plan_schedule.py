"""Learning rate of every step, by exact number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config import ScheduleConfig, Span
from megatron_cpt.planning.timeline.schedule import Schedule, schedule_problems, span_steps

SHAPES = ("cosine", "linear", "constant", "wsd")
DECAYS = ("linear", "cosine", "exponential", "minus_sqrt")


def schedule(shape: str = "cosine", steps: int = 100, **changes) -> Schedule:
    return Schedule(**{"shape": shape, "max_lr": 1e-3, "min_lr": 1e-5, "steps": steps, **changes})


def section(**values) -> ScheduleConfig:
    return ScheduleConfig.model_validate({"max_lr": 1e-3, "min_lr": 1e-5, **values})


@st.composite
def schedules(draw, shapes=SHAPES):
    steps = draw(st.integers(2, 5000))
    warmup = draw(st.integers(0, steps - 2))
    return Schedule(
        shape=draw(st.sampled_from(shapes)),
        max_lr=(max_lr := draw(st.floats(1e-7, 1.0))),
        min_lr=draw(st.one_of(st.just(0.0), st.floats(0, 1).map(lambda share: share * max_lr))),
        steps=steps,
        warmup_steps=warmup,
        decay_steps=draw(st.integers(1, steps - warmup)),
        decay_shape=draw(st.sampled_from(DECAYS)),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_without_warm_up_step_1_runs_at_max_lr_exactly(shape):
    # 4.5e-7 + 1.0 * (4.5e-5 - 4.5e-7) would be off in the last bit
    assert schedule(shape, max_lr=4.5e-5, min_lr=4.5e-7, decay_steps=20).rate(1) == 4.5e-5


@pytest.mark.parametrize(
    ("shape", "step", "rate"),
    [
        ("cosine", 26, 1e-5 + 99e-5 * (1 + math.sqrt(0.5)) / 2),  # t = 1/4
        ("cosine", 51, 1e-5 + 99e-5 / 2),  # t = 1/2
        ("cosine", 101, 1e-5),
        ("linear", 26, 1e-5 + 99e-5 * 0.75),
        ("linear", 100, 1e-5 + 99e-5 * 0.01),
        ("constant", 100, 1e-3),
        ("constant", 101, 1e-3),
    ],
)
def test_exact_numbers(shape, step, rate):
    assert schedule(shape).rate(step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("decay_shape", "half_way"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", math.sqrt(2) - 1), ("minus_sqrt", 1 - math.sqrt(0.5))],
)
def test_wsd(decay_shape, half_way):
    wsd = schedule("wsd", warmup_steps=10, decay_steps=20, decay_shape=decay_shape)
    assert wsd.rate(1) == 0.0
    assert wsd.rate(6) == pytest.approx(0.5e-3)
    assert {wsd.rate(step) for step in range(11, 82)} == {1e-3}  # from 10 warmup steps done to 80 of 100 done
    assert wsd.rate(82) < 1e-3
    assert wsd.rate(91) == pytest.approx(1e-5 + 99e-5 * half_way)
    assert wsd.rate(101) == 1e-5


def test_warm_up_is_linear_and_the_decay_takes_what_is_left():
    warmed = schedule(warmup_steps=20)
    assert [warmed.rate(step) for step in (1, 2, 11, 21)] == pytest.approx([0.0, 0.05e-3, 0.5e-3, 1e-3])
    assert warmed.rate(61) == pytest.approx(1e-5 + 99e-5 / 2)  # 40 of the 80 steps after the warmup


@given(schedules())
def test_rates_stay_within_their_bounds_and_fall_after_the_peak(run):
    rates = run.rates(range(1, run.steps + 1))
    assert rates.max() <= run.max_lr
    assert rates[run.warmup_steps] == run.max_lr
    assert rates[run.warmup_steps :].min() >= run.min_lr
    assert (np.diff(rates[: run.warmup_steps + 1]) > 0).all()
    assert (np.diff(rates[run.warmup_steps :]) <= 1e-15 * run.max_lr).all()
    assert run.rate(run.steps + 1) == (run.max_lr if run.shape == "constant" else run.min_lr)


@given(schedules(), st.floats(1e-3, 0.999))
def test_the_last_step_above_a_rate(run, share):
    wanted = share * run.max_lr
    last = run.last_step_above(wanted)
    assert run.warmup_steps < last <= run.steps
    assert run.rate(last) > wanted
    if last < run.steps:
        assert run.rate(last + 1) <= wanted
        assert not (run.rates(range(last + 1, run.steps + 1)) > wanted * (1 + 1e-12)).any()


@pytest.mark.parametrize(
    ("share", "last"), [(0.2, 45_225), (0.5, 31_994), (0.1, 51_183), (0.02, 59_505), (1 - 1e-9, 2)]
)
def test_the_switch_points_of_the_paper(share, last):
    run = schedule(max_lr=4.5e-5, min_lr=4.5e-7, steps=63_579)
    assert run.last_step_above(share * run.max_lr) == last
    # where the recipe says it falls: cos(pi t) = 2 (rate - min) / (max - min) - 1
    t = math.acos(2 * (share * 4.5e-5 - 4.5e-7) / (4.5e-5 - 4.5e-7) - 1) / math.pi
    assert last == math.ceil(t * 63_579)


def test_the_switch_of_the_recipe_is_at_71_13_percent():
    assert round(100 * 45_225 / 63_579, 2) == 71.13


def test_a_rate_that_is_never_reached():
    assert schedule("constant").last_step_above(0.5e-3) == 100
    assert schedule(min_lr=0.6e-3).last_step_above(0.5e-3) == 100


@pytest.mark.parametrize(
    ("span", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1000}, 1),
        ({"tokens": 1001}, 2),
        ({"fraction": 0.07}, 7),  # 0.07 * 100 is 7.000000000000001
        ({"fraction": 0.071}, 8),
        ({"fraction": 1.0}, 100),
    ],
)
def test_spans_are_whole_steps(span, steps):
    assert span_steps(Span.model_validate(span), steps=100, tokens_per_step=1000) == steps


def test_the_pretraining_warm_up_in_steps():
    assert span_steps(Span(tokens=16 * 10**9), 10**6, 4_718_592) == 3_391


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"warmup": 100}, "schedule.warmup: 100 steps, but the run has 100"),
        ({"warmup": "1M"}, "schedule.warmup: 1M tokens = 1,000 steps, but the run has 100"),
        ({"warmup": 1.0}, "schedule.warmup: 1 of the run = 100 steps, but the run has 100"),
        (
            {"shape": "wsd", "warmup": 60, "decay": 0.5},
            "schedule.decay: 0.5 of the run = 50 steps and schedule.warmup: 60",
        ),
        ({"shape": "wsd", "decay": 0}, "schedule.decay: 0 keeps the rate at max_lr"),
    ],
)
def test_spans_without_room(values, text):
    wanted = section(**values)
    problems = list(schedule_problems(wanted, Schedule.resolve(wanted, 100, 1000)))
    assert len(problems) == 1
    assert text in problems[0].text


@pytest.mark.parametrize("values", [{"warmup": 99}, {"shape": "wsd", "warmup": 50, "decay": 0.5}, {"decay": 200}])
def test_spans_with_room(values):
    wanted = section(**values)
    assert list(schedule_problems(wanted, Schedule.resolve(wanted, 100, 1000))) == []


def test_a_schedule_without_room_still_has_rates(run_data):
    """Build the plan in spite of problems, so that all of them are found."""
    for values in ({"warmup": 500}, {"shape": "wsd", "warmup": 90, "decay": 0.5}, {"shape": "wsd", "decay": 0}):
        run = Schedule.resolve(section(**values), 100, 1000)
        assert np.isfinite(run.rates(range(1, 102))).all()
