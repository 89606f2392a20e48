"""Learning rate of every step.

The rate of step k, counted from 1, is the schedule at t = (k - 1) / steps. Without warmup, step 1 runs at max_lr, and
step `steps + 1` would run at min_lr. The curves equal megatron-core's `OptimizerParamScheduler.get_lr`, so Megatron-LM
gives the same rates.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_cpt.config import ScheduleConfig, Span, format_count
from megatron_cpt.planning.problem import Problem

LENGTH_KEYS = ("tokens", "seq_length", "batch.global", "batch.ramp_up", "phases[*].seq_length", "phases[*].batch")
SCHEDULE_KEYS = ("schedule", *LENGTH_KEYS)


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule with all spans in steps.

    Attributes:
        min_lr: rate at t = 1.
        warmup_steps: steps in which the rate increases linearly from 0; the curve covers the remaining steps.
        decay_steps: steps at the end in which the rate falls; wsd only.
    """

    shape: str
    max_lr: float
    min_lr: float
    steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    decay_shape: str = "linear"

    @classmethod
    def resolve(cls, section: ScheduleConfig, steps: int, tokens_per_step: int) -> Schedule:
        """Return the schedule over `steps` steps of `tokens_per_step` tokens each."""
        decay = span_steps(section.decay, steps, tokens_per_step) if section.shape == "wsd" else 0
        warmup = span_steps(section.warmup, steps, tokens_per_step)
        return cls(section.shape, section.max_lr, section.min_lr, steps, warmup, decay, section.decay_shape)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1; beyond the end min_lr, for `constant` max_lr."""
        done = step - 1
        if done < self.warmup_steps:
            return self.max_lr * (done / self.warmup_steps)
        share = self._share_of_range(done)
        # This form gives exactly max_lr at share 1 and min_lr at share 0. Between nearly equal bounds rounding could
        # leave them, hence the clamp.
        return min(self.max_lr, max(self.min_lr, share * self.max_lr + (1.0 - share) * self.min_lr))

    def rates(self, steps: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the rates of many steps, for plots.

        Calls `rate` per step: numpy's vectorized cosine may differ in the last bit.
        """
        return np.array([self.rate(int(step)) for step in steps], dtype=np.float64)

    def last_step_above(self, rate: float) -> int:
        """Return the last step whose rate is above `rate`; `steps` if the rate never falls that far.

        Bisects the steps after the peak, where the rate only falls. Comparing rates is exact; inverting the formula
        would round. `rate` must be below max_lr.
        """
        peak = self.warmup_steps + 1
        falling = range(peak + 1, self.steps + 1)
        return min(self.steps, peak + bisect_left(falling, -rate, key=lambda step: -self.rate(step)))

    def _share_of_range(self, done: int) -> float:
        """Return the rate after `done` steps, at least the warmup, as a share between min_lr (0) and max_lr (1)."""
        if self.shape == "constant":
            return 1.0
        if done >= self.steps:
            return 0.0
        if self.shape == "wsd":
            stable_until = self.steps - self.decay_steps
            if done <= stable_until:
                return 1.0
            return _decay_curve(self.decay_shape, (done - stable_until) / self.decay_steps)
        return _decay_curve(self.shape, (done - self.warmup_steps) / (self.steps - self.warmup_steps))


def _decay_curve(shape: str, x: float) -> float:
    """Return the curve that falls from 1 at x = 0 to 0 at x = 1."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * x))
    if shape == "linear":
        return 1.0 - x
    if shape == "minus_sqrt":  # Hägele et al., arXiv 2405.18392
        return 1.0 - math.sqrt(x)
    # The half-life curve 0.5^x, which ends at 0.5, shifted and scaled to end at 0.
    assert shape == "exponential", shape
    return float(2.0 * 0.5**x - 1.0)


def span_steps(span: Span, steps: int, tokens_per_step: int) -> int:
    """Return a span in steps, rounded up."""
    if span.steps is not None:
        return span.steps
    if span.tokens is not None:
        return -(-span.tokens // tokens_per_step)
    assert span.fraction is not None
    return math.ceil(span.fraction * steps - 1e-9)  # 0.07 * 100 is 7.000000000000001


def describe_span(span: Span, steps: int) -> str:
    """Return a span as text in its own unit and in steps: `16B tokens = 3,391 steps`."""
    if span.steps is not None:
        return f"{span.steps:,} steps"
    text = f"{format_count(span.tokens)} tokens" if span.tokens is not None else f"{span.fraction:g} of the run"
    return f"{text} = {steps:,} steps"


def schedule_problems(section: ScheduleConfig, schedule: Schedule) -> Iterator[Problem]:
    """Yield problems of spans that are longer than the run."""
    steps, warmup, decay = schedule.steps, schedule.warmup_steps, schedule.decay_steps
    warmup_text = f"schedule.warmup: {describe_span(section.warmup, warmup)}"
    wsd_keys = ("schedule.shape", "schedule.warmup", "schedule.decay", *LENGTH_KEYS)
    if warmup >= steps:
        text = f"{warmup_text}, but the run has {steps:,} and would end during the warmup"
        advice = "shorten it (0 for a run that continues at max_lr) or raise tokens"
        yield Problem(f"{text}; {advice}", ("schedule.warmup", *LENGTH_KEYS))
    elif schedule.shape == "wsd" and warmup + decay > steps:
        text = f"schedule.decay: {describe_span(section.decay, decay)} and {warmup_text} exceed the {steps:,} steps"
        yield Problem(f"{text} of the run; shorten one of them or raise tokens", wsd_keys)
    if schedule.shape == "wsd" and decay == 0:
        yield Problem("schedule.decay: 0 keeps the rate at max_lr; use schedule.shape: constant", wsd_keys)
