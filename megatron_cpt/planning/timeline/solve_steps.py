"""Number of steps and schedule of a run whose steps differ in tokens.

There is a cycle: `until: {lr: 0.2}` depends on the number of steps, which depends on the tokens per step of each phase,
which depend on the ends of the phases. Tokens grow almost in proportion to the number of steps. So a few trials, each
of which lays out the whole run, find the smallest number of steps that reaches the tokens of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_cpt.config import RunConfig
from megatron_cpt.planning.timeline.schedule import Schedule, span_steps
from megatron_cpt.planning.timeline.segments import (
    RunProgress,
    Segment,
    phase_segments,
    split_into_segments,
    step_reaching,
)


def solve_schedule(config: RunConfig) -> Schedule:
    """Return the schedule over the smallest number of steps that reaches `tokens`."""
    own = [phase.batch.global_ if phase.batch else None for phase in config.phases]
    lengths = [config.length_of(phase) for phase in config.phases]
    shapes = {(size or config.batch.global_) * length for size, length in zip(own, lengths, strict=True)}
    if len(shapes) == 1 and (config.batch.ramp_up is None or None not in own):
        (tokens_per_step,) = shapes
        return Schedule.resolve(config.schedule, -(-config.tokens // tokens_per_step), tokens_per_step)
    smallest = min([config.batch.global_, *config.batch.ramp_sizes[:1], *(size for size in own if size)])
    most = -(-config.tokens // (smallest * min(lengths)))
    warmup = _warmup_steps(config)

    def trained(steps: int) -> int:
        return _segments(config, _schedule_over(config, steps, warmup))[-1].end.tokens

    return _schedule_over(config, smallest_reaching(config.tokens, most, trained), warmup)


def _segments(config: RunConfig, schedule: Schedule) -> list[Segment]:
    return [segment for _, segments in split_into_segments(config, schedule) for segment in segments]


def smallest_reaching(target: int, most: int, value: Callable[[int], int]) -> int:
    """Return the smallest n in 1 to `most` with value(n) >= target, or `most` if no n does.

    Interpolates, then checks the neighbor, then bisects. For proportional values the first guess is right and the
    second proves it: target 1,000 with value(n) = 7 n gives 143, since 142 reaches only 994. Bisection limits the calls
    to three times as many as bisection alone needs.

    `value` must not decrease with n; value(0) is taken as 0.
    """
    low, high, at_low, at_high = 0, most, 0, value(most)
    if at_high < target:
        return most

    def evaluate(n: int) -> None:
        nonlocal low, high, at_low, at_high
        if low < n < high:
            found = value(n)
            if found < target:
                low, at_low = n, found
            else:
                high, at_high = n, found

    while high - low > 1:
        guess = low - (at_low - target) * (high - low) // (at_high - at_low)
        evaluate(guess)
        evaluate(guess - 1 if high <= guess else guess + 1)
        evaluate((low + high) // 2)
    return high


def _schedule_over(config: RunConfig, steps: int, warmup: int | None) -> Schedule:
    """Return the schedule over `steps` steps; `warmup` is its warmup in steps, if run.yaml gives it in tokens."""
    section = config.schedule
    without = Schedule(section.shape, section.max_lr, section.min_lr, steps, 0, 0, section.decay_shape)
    if warmup is None:
        warmup = span_steps(section.warmup, steps, 1)
    decay = 0
    if section.shape == "wsd":
        decay = _decay_steps(config, without, warmup) if section.decay.tokens else span_steps(section.decay, steps, 1)
    return replace(without, warmup_steps=warmup, decay_steps=decay)


def _warmup_steps(config: RunConfig) -> int | None:
    """Return the steps of a warmup that run.yaml gives in tokens, else None.

    A phase with `until: {lr: ...}` ends after the warmup, so it covers the rest of the warmup.
    """
    tokens = config.schedule.warmup.tokens
    if tokens is None:
        return None
    done: list[Segment] = []
    for phase in config.phases:
        begin = done[-1].end if done else RunProgress()
        until = phase.until
        if phase is config.phases[-1] or until is None or until.lr is not None:
            done += phase_segments(config, phase, begin, tokens=tokens)
            break
        done += phase_segments(config, phase, begin, last_step=until.step, tokens=until.tokens)
    return step_reaching(done, tokens) if tokens else 0


def _decay_steps(config: RunConfig, schedule: Schedule, warmup: int) -> int:
    """Return the smallest number of steps at the end of a run that have the tokens of the decay, at most all steps."""
    tokens = config.schedule.decay.tokens
    assert tokens is not None

    def trained(decay: int) -> int:
        """Return the tokens of the last `decay` steps, with the phase ends that this decay gives."""
        segments = _segments(config, replace(schedule, warmup_steps=warmup, decay_steps=decay))
        first = schedule.steps - decay + 1
        before = next(s for s in segments if first <= s.last_step).after(first - 1)
        return segments[-1].end.tokens - before.tokens

    return smallest_reaching(tokens, schedule.steps, trained)
