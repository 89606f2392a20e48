"""Segments: consecutive steps of equal batch and sequence length, from batch ramp-up and phases."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_cpt.config import BatchConfig, PhaseConfig, RunConfig
from megatron_cpt.planning.timeline.schedule import Schedule


@dataclass(frozen=True)
class RunProgress:
    """Progress between two steps: steps, samples and tokens done."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one phase with equal batch and sequence length.

    Attributes:
        first_step: first step, counted from 1 over the whole run.
        first_sample: samples read before the segment.
        first_token: tokens trained on before the segment.
        global_batch: sequences per step, over all ranks.
        micro_batch: sequences per forward pass of one rank.
        seq_length: tokens per sequence.
        is_ramp: the batch belongs to `batch.ramp_up` and is not the full one.
    """

    first_step: int
    last_step: int
    first_sample: int
    first_token: int
    global_batch: int
    micro_batch: int
    seq_length: int
    is_ramp: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Global batch, micro-batch and sequence length."""
        return self.global_batch, self.micro_batch, self.seq_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step."""
        return self.global_batch * self.seq_length

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return self.last_step - self.first_step + 1

    @property
    def end(self) -> RunProgress:
        """Progress after the last step."""
        return self.after(self.last_step)

    def after(self, step: int) -> RunProgress:
        """Return the progress after a step of the segment, or after the step before its first."""
        done = step - self.first_step + 1
        samples, tokens = done * self.global_batch, done * self.tokens_per_step
        return RunProgress(step, self.first_sample + samples, self.first_token + tokens)


def batch_size(batch: BatchConfig, samples: int) -> int:
    """Return the global batch of the step that starts after `samples` samples.

    Follows megatron-core's `RampupBatchsizeNumMicroBatchesCalculator` (`megatron/core/num_microbatches_calculator.py`),
    including its floating-point division. Example: `{start: 2, increment: 2, samples: 12}` with `global: 8` grows
    after every 12 / 3 = 4 samples, so steps read 2, 2, 4, 6, 8, 8, ... samples.
    """
    ramp = batch.ramp_up
    if ramp is None or samples > ramp.samples or ramp.start + ramp.increment > batch.global_:
        return batch.global_
    num_increments = (batch.global_ - ramp.start) // ramp.increment
    return ramp.start + int(samples / (ramp.samples / num_increments)) * ramp.increment


def phase_segments(
    config: RunConfig,
    phase: PhaseConfig,
    begin: RunProgress,
    *,
    last_step: int | None = None,
    tokens: int | None = None,
) -> Iterator[Segment]:
    """Yield the segments of a phase; exactly one of `last_step` and `tokens` decides its end.

    With `tokens` it ends with the first step after which the run has trained on this many tokens.
    """
    own = phase.batch.global_ if phase.batch is not None else None
    length, micro, mark = config.length_of(phase), config.micro_batch_of(phase), begin
    while True:
        size = own or batch_size(config.batch, mark.samples)
        if last_step is not None:
            steps = last_step - mark.steps
        else:
            assert tokens is not None
            steps = -(-(tokens - mark.tokens) // (size * length))
        if own is None:
            steps = min(steps, _steps_of_size(config.batch, mark.samples, size))
        if steps <= 0:
            return
        is_ramp = own is None and size != config.batch.global_
        first, last = mark.steps + 1, mark.steps + steps
        segment = Segment(first, last, mark.samples, mark.tokens, size, micro, length, is_ramp)
        yield segment
        mark = segment.end


def _steps_of_size(batch: BatchConfig, samples: int, size: int) -> int:
    """Return the number of steps, the first one after `samples` samples, in which the ramp-up keeps its size."""
    ramp = batch.ramp_up
    if ramp is None or size == batch.global_:
        return sys.maxsize
    num_increments = (batch.global_ - ramp.start) // ramp.increment
    share = ramp.samples / num_increments
    grows_at = ((size - ramp.start) // ramp.increment + 1) * share
    steps = max(1, int((grows_at - samples) / size))
    # Rounding may be off by a step, so `batch_size` decides.
    while steps > 1 and batch_size(batch, samples + (steps - 1) * size) != size:
        steps -= 1
    while batch_size(batch, samples + steps * size) == size:
        steps += 1
    return steps


def split_into_segments(config: RunConfig, schedule: Schedule) -> list[tuple[int, tuple[Segment, ...]]]:
    """Return the step that `until` gives and the segments inside the run, of each phase.

    The step may be before the first step of the phase, or beyond the run.
    """
    tiled: list[tuple[int, tuple[Segment, ...]]] = []
    done: list[Segment] = []
    for phase in config.phases:
        begin = done[-1].end if done else RunProgress()
        if phase is config.phases[-1]:
            last = schedule.steps
        elif phase.until is None:
            last = begin.steps + 1  # reported by config/checks.py
        elif phase.until.lr is not None:
            last = schedule.last_step_above(phase.until.lr * schedule.max_lr)
        elif phase.until.step is not None:
            last = phase.until.step
        else:
            assert phase.until.tokens is not None
            ahead = phase_segments(config, phase, begin, tokens=phase.until.tokens)
            last = step_reaching((*done, *ahead), phase.until.tokens)
        segments = tuple(phase_segments(config, phase, begin, last_step=min(last, schedule.steps)))
        done += segments
        tiled.append((last, segments))
    return tiled


def step_reaching(segments: Sequence[Segment], tokens: int) -> int:
    """Return the first step after which a run has trained on `tokens` tokens, or its last step if it never does."""
    for segment in segments:
        if segment.end.tokens >= tokens:
            return segment.first_step - 1 - (segment.first_token - tokens) // segment.tokens_per_step
    return segments[-1].last_step


def step_of_sample(segments: Sequence[Segment], sample: int) -> int:
    """Return the step that reads a sample, counted from 0 over the whole run."""
    segment = next(segment for segment in segments if sample < segment.end.samples)
    return segment.first_step + (sample - segment.first_sample) // segment.global_batch
