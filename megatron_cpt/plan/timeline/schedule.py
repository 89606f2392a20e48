"""The learning rate of every step.

The rate of step k (from 1) is the schedule at t = (k - 1) / steps: without a warm-up step 1 runs at max_lr, and the
rate reaches min_lr where step `steps + 1` would be. The shapes are those of megatron-core's
`OptimizerParamScheduler.get_lr`, so a run that was planned here and one that Megatron-LM scheduled agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_cpt.config import ScheduleConfig, Span, format_count
from megatron_cpt.plan.problem import Problem

LENGTH_KEYS = ("tokens", "seq_length", "batch.global", "batch.ramp_up", "phases[*].seq_length", "phases[*].batch")
SCHEDULE_KEYS = ("schedule", *LENGTH_KEYS)


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule with every span resolved into steps.

    Attributes:
        shape: cosine, linear, constant or wsd (warm-up, stable, decay).
        max_lr: the highest rate.
        min_lr: the rate at t = 1.
        steps: length of the run.
        warmup_steps: steps in which the rate rises linearly from 0; the decay runs over what is left.
        decay_steps: wsd only: steps at the end in which the rate falls.
        decay_shape: wsd only: linear, cosine, exponential or minus_sqrt.
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
        """The schedule of a section of run.yaml over a run of `steps` steps that have as many tokens each."""
        decay = span_steps(section.decay, steps, tokens_per_step) if section.shape == "wsd" else 0
        warmup = span_steps(section.warmup, steps, tokens_per_step)
        return cls(section.shape, section.max_lr, section.min_lr, steps, warmup, decay, section.decay_shape)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1; min_lr (constant: max_lr) beyond the end of the run."""
        done = step - 1
        if done < self.warmup_steps:
            return self.max_lr * (done / self.warmup_steps)
        share = self._height(done)
        # Weighted this way round both ends are hit exactly: share 1 gives max_lr, share 0 gives min_lr. Between them
        # rounding must not leave the bounds, as it can where they are (nearly) equal.
        return min(self.max_lr, max(self.min_lr, share * self.max_lr + (1.0 - share) * self.min_lr))

    def rates(self, steps: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The rates of many steps, for plots.

        Step by step through `rate` on purpose: numpy's vectorized cosine may differ from it in the last bit.
        """
        return np.array([self.rate(int(step)) for step in steps], dtype=np.float64)

    def last_step_above(self, rate: float) -> int:
        """The last step whose rate is above `rate`; `steps` where it never falls that far.

        Looked for after the peak, where the rate only falls, by bisection on `rate` itself: the answer is exact, free
        of the rounding that an inverted formula would bring.

        Args:
            rate: a learning rate below max_lr.
        """
        above, below = self.warmup_steps + 1, self.steps + 1
        if above >= below or self.rate(self.steps) > rate:
            return self.steps
        while below - above > 1:
            middle = (above + below) // 2
            if self.rate(middle) > rate:
                above = middle
            else:
                below = middle
        return above

    def _height(self, done: int) -> float:
        """Where the rate stands between min_lr (0) and max_lr (1) after `done` steps, the warm-up being over."""
        if self.shape == "constant":
            return 1.0
        if done >= self.steps:
            return 0.0
        if self.shape == "wsd":
            stable_until = self.steps - self.decay_steps
            return 1.0 if done <= stable_until else _fall(self.decay_shape, (done - stable_until) / self.decay_steps)
        return _fall(self.shape, (done - self.warmup_steps) / (self.steps - self.warmup_steps))


def _fall(shape: str, x: float) -> float:
    """From 1 at x = 0 to 0 at x = 1."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * x))
    if shape == "linear":
        return 1.0 - x
    if shape == "minus_sqrt":  # Hägele et al., arXiv 2405.18392
        return 1.0 - math.sqrt(x)
    # A half-life curve, moved and stretched so that it ends at 0 and not at a half.
    assert shape == "exponential", shape
    return float(2.0 * 0.5**x - 1.0)


def span_steps(span: Span, steps: int, tokens_per_step: int) -> int:
    """A span in whole steps, rounded up."""
    if span.steps is not None:
        return span.steps
    if span.tokens is not None:
        return -(-span.tokens // tokens_per_step)
    assert span.fraction is not None
    return math.ceil(span.fraction * steps - 1e-9)  # 0.07 * 100 is 7.000000000000001


def describe_span(span: Span, steps: int) -> str:
    """A span in the words of run.yaml, and in steps where it was given in another unit."""
    if span.steps is not None:
        return f"{span.steps:,} steps"
    text = f"{format_count(span.tokens)} tokens" if span.tokens is not None else f"{span.fraction:g} of the run"
    return f"{text} = {steps:,} steps"


def schedule_problems(section: ScheduleConfig, schedule: Schedule) -> Iterator[Problem]:
    """Spans that the run has no room for."""
    steps, warmup, decay = schedule.steps, schedule.warmup_steps, schedule.decay_steps
    warmup_text = f"schedule.warmup: {describe_span(section.warmup, warmup)}"
    wsd_keys = ("schedule.shape", "schedule.warmup", "schedule.decay", *LENGTH_KEYS)
    if warmup >= steps:
        text = f"{warmup_text}, but the run has {steps:,}: none is left at max_lr and below"
        way_out = "shorten it (a continued run needs none: 0) or raise tokens"
        yield Problem(f"{text}; {way_out}", ("schedule.warmup", *LENGTH_KEYS))
    elif schedule.shape == "wsd" and warmup + decay > steps:
        text = f"schedule.decay: {describe_span(section.decay, decay)} and {warmup_text} exceed the {steps:,} steps"
        yield Problem(f"{text} of the run; shorten one of them or raise tokens", wsd_keys)
    if schedule.shape == "wsd" and decay == 0:
        yield Problem("schedule.decay: 0 never leaves max_lr; use schedule.shape: constant", wsd_keys)
