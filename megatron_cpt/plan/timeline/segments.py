"""Runs of steps with one shape: a batch that ramps up, phases with a batch or a sequence length of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_cpt.config import BatchConfig, PhaseConfig, RunConfig
from megatron_cpt.plan.timeline.schedule import Schedule


@dataclass(frozen=True)
class Mark:
    """A place between two steps: what was done before it."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Segment:
    """Steps in a row, of one phase, that have one shape.

    Attributes:
        first_step: its first step, counted from 1 over the whole run.
        last_step: its last step.
        first_sample: samples that the run has read before it.
        first_token: tokens that the run has trained on before it.
        global_batch: sequences in each of its steps, over all ranks.
        micro_batch: sequences in one forward pass of one rank.
        seq_length: tokens in a sequence.
        is_ramp: whether the batch is one that `batch.ramp_up` will let grow.
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
    def tokens_per_step(self) -> int:
        """Tokens that each of its steps trains on."""
        return self.global_batch * self.seq_length

    @property
    def end(self) -> Mark:
        """The place after its last step."""
        return self.after(self.last_step)

    def after(self, step: int) -> Mark:
        """The place after one of its steps, or after the step before its first."""
        done = step - self.first_step + 1
        samples, tokens = done * self.global_batch, done * self.tokens_per_step
        return Mark(step, self.first_sample + samples, self.first_token + tokens)


def batch_size(batch: BatchConfig, samples: int) -> int:
    """The global batch of the step before which the run has read `samples` samples.

    The rule is that of megatron-core's `RampupBatchsizeNumMicroBatchesCalculator`
    (`megatron/core/num_microbatches_calculator.py`), its floating-point division included.
    """
    ramp = batch.ramp_up
    if ramp is None or samples > ramp.samples or ramp.start + ramp.increment > batch.global_:
        return batch.global_
    num_increments = (batch.global_ - ramp.start) // ramp.increment
    return ramp.start + int(samples / (ramp.samples / num_increments)) * ramp.increment


def walk(
    config: RunConfig, phase: PhaseConfig, begin: Mark, *, last_step: int | None = None, tokens: int | None = None
) -> Iterator[Segment]:
    """The segments of a phase.

    Args:
        config: the run.
        phase: one of its phases.
        begin: where it begins.
        last_step: where it ends; or:
        tokens: it ends with the first step after which the run has trained on as many.
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
    """For how many steps, the first of which begins after `samples` samples, the ramp keeps the size it has there."""
    ramp = batch.ramp_up
    if ramp is None or size == batch.global_:
        return sys.maxsize
    num_increments = (batch.global_ - ramp.start) // ramp.increment
    share = ramp.samples / num_increments
    grows_at = ((size - ramp.start) // ramp.increment + 1) * share
    steps = max(1, int((grows_at - samples) / size))
    # Floating point may have it a step off: the rule itself decides.
    while steps > 1 and batch_size(batch, samples + (steps - 1) * size) != size:
        steps -= 1
    while batch_size(batch, samples + steps * size) == size:
        steps += 1
    return steps


@dataclass(frozen=True)
class PhaseSteps:
    """A phase as steps.

    Attributes:
        last: the step that its `until` names, wherever that lies: it may be before its first, or beyond the run.
        segments: those of its steps that are part of the run.
    """

    last: int
    segments: tuple[Segment, ...]


def tile(config: RunConfig, schedule: Schedule) -> list[PhaseSteps]:
    """Cut the steps of a run into phases, and those into segments."""
    tiled: list[PhaseSteps] = []
    done: list[Segment] = []
    for phase in config.phases:
        begin = done[-1].end if done else Mark()
        if phase is config.phases[-1]:
            last = schedule.steps
        elif phase.until is None:
            last = begin.steps + 1  # the configuration's checks say so
        elif phase.until.lr is not None:
            last = schedule.last_step_above(phase.until.lr * schedule.max_lr)
        elif phase.until.step is not None:
            last = phase.until.step
        else:
            assert phase.until.tokens is not None
            ahead = walk(config, phase, begin, tokens=phase.until.tokens)
            last = step_reaching((*done, *ahead), phase.until.tokens)
        segments = tuple(walk(config, phase, begin, last_step=min(last, schedule.steps)))
        done += segments
        tiled.append(PhaseSteps(last, segments))
    return tiled


def step_reaching(segments: Sequence[Segment], tokens: int) -> int:
    """The first step after which a run has trained on `tokens` tokens; the last of all where it does not get there."""
    for segment in segments:
        if segment.end.tokens >= tokens:
            return segment.first_step - 1 - (segment.first_token - tokens) // segment.tokens_per_step
    return segments[-1].last_step


def step_of_sample(segments: Sequence[Segment], sample: int) -> int:
    """The step that reads a sample, counted from 0 over the whole run."""
    segment = next(segment for segment in segments if sample < segment.end.samples)
    return segment.first_step + (sample - segment.first_sample) // segment.global_batch
