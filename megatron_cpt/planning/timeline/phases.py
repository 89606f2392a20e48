"""First and last step of each phase, and the tokens it reads of each source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_cpt.config import PhaseConfig, RunConfig, Until, format_count, format_number_of
from megatron_cpt.planning.problem import Problem
from megatron_cpt.planning.timeline.epochs import SourceUse, divide_samples, normalize, span_limits
from megatron_cpt.planning.timeline.schedule import LENGTH_KEYS, SCHEDULE_KEYS, Schedule
from megatron_cpt.planning.timeline.segments import Segment, split_into_segments, step_of_sample
from megatron_cpt.sampling.spans import SpanGrid


@dataclass(frozen=True)
class PhasePlan:
    """Phase with its steps.

    Attributes:
        first_step: first step, counted from 1 over the whole run.
        num_samples: sequences.
        sources: readings in the order of the blend.
        ends: approximate step in which a source ends, for sources with `on_exhausted: renormalize` that end.
    """

    name: str
    first_step: int
    last_step: int
    num_samples: int
    tokens: int
    lr_first: float
    lr_last: float
    sources: Mapping[str, SourceUse]
    seq_length: int
    segments: tuple[Segment, ...]
    ends: Mapping[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, float]:
        """Share of each source in the blend; shares sum to 1."""
        return {name: use.weight for name, use in self.sources.items()}

    @property
    def first_sample(self) -> int:
        """First sample, counted from 0 over the whole run."""
        return self.segments[0].first_sample

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return self.last_step - self.first_step + 1


@dataclass(frozen=True)
class SourcePosition:
    """Next sample of a source, counted over all epochs in samples of the phase that read it last."""

    seq_length: int
    sample_index: int = 0

    def at_length(self, seq_length: int, grid: SpanGrid | None) -> SourcePosition:
        """Return the position for samples of another length; approximate if the size of the source is unknown."""
        if grid is not None and grid.num_spans:
            return SourcePosition(seq_length, grid.first_unread(self.sample_index, self.seq_length, seq_length))
        return SourcePosition(seq_length, -(-self.sample_index * self.seq_length // seq_length))


def plan_phases(
    config: RunConfig, schedule: Schedule, grids: Mapping[str, SpanGrid]
) -> tuple[list[PhasePlan], list[Problem], dict[str, SourcePosition]]:
    """Return the phases that have steps, their problems, and the position of each source after its last phase.

    `grids` has the spans of each source of known size; config/checks.py reports unknown sources and invalid weights.
    """
    phases: list[PhasePlan] = []
    problems: list[Problem] = []
    positions: dict[str, SourcePosition] = {}
    limits = span_limits(config.sources, grids)
    for index, (last, segments) in enumerate(split_into_segments(config, schedule)):
        problems += _end_problems(config, schedule, index, phases[-1].last_step + 1 if phases else 1, last)
        if segments:
            phases.append(_plan_phase(config, schedule, config.phases[index], segments, grids, positions, limits))
            problems += _shortage_problems(index, phases[-1])
    return phases, problems, positions


def _end_problems(config: RunConfig, schedule: Schedule, index: int, first: int, last: int) -> Iterator[Problem]:
    """Yield the problem of the end of phase `index`, whose first step is `first`."""
    phase, steps = config.phases[index], schedule.steps
    if phase.until is None or index == len(config.phases) - 1:
        return  # config/checks.py reports an `until` that is missing, or that the last phase should not have
    unit = "lr" if phase.until.lr is not None else "tokens" if phase.until.tokens is not None else "step"
    keys = (f"phases[{index}].until", *(SCHEDULE_KEYS if unit == "lr" else LENGTH_KEYS))
    key = f"phases[{index}].until (phase {phase.name}): {_describe(phase.until)}"
    if last < first:
        text = f"{key} is step {last:,}, but the previous phase ends with step {first - 1:,}, so this one has no step"
        yield Problem(f"{text}; `until` counts from the start of the run: choose a later end", keys)
    elif last >= steps and unit == "lr":
        floor = schedule.rate(steps) / schedule.max_lr
        text = f"{key} of max_lr is never reached: the last step runs at {floor:.3g} of it"
        yield Problem(f"{text}; choose a larger fraction, or tokens or step", keys)
    elif last >= steps:
        text = f"{key} is step {last:,}, but the run ends with step {steps:,}, so the next phase has no step"
        yield Problem(f"{text}; choose an earlier end or raise tokens", keys)


def _describe(until: Until) -> str:
    if until.lr is not None:
        return f"lr: {until.lr:g}"
    return f"tokens: {format_count(until.tokens)}" if until.tokens is not None else f"step: {until.step}"


def _plan_phase(
    config: RunConfig,
    schedule: Schedule,
    phase: PhaseConfig,
    segments: tuple[Segment, ...],
    grids: Mapping[str, SpanGrid],
    positions: dict[str, SourcePosition],
    limits: Mapping[str, int],
) -> PhasePlan:
    """Return a planned phase, and advance its sources in `positions`.

    Sources with an invalid weight, which config/checks.py reports, are skipped.
    """
    first, last, length = segments[0], segments[-1], segments[0].seq_length
    weights = normalize({name: weight for name, weight in phase.blend.items() if math.isfinite(weight) and weight > 0})
    parts = {name: grids[name].parts(length) for name in weights if name in grids}
    for name in weights:
        positions[name] = positions.get(name, SourcePosition(length)).at_length(length, grids.get(name))
    limited = {name: limit for name, limit in limits.items() if name in weights}
    room = {name: limit * parts[name] - positions[name].sample_index for name, limit in limited.items()}
    samples = last.end.samples - first.first_sample
    counts, ended = divide_samples(weights, samples, room)
    uses = {}
    for name, count in counts.items():
        epoch = grids[name].num_spans * parts[name] if name in grids else 0
        uses[name] = SourceUse(weights[name], count, count * length, count / epoch if epoch else None)
        positions[name] = replace(positions[name], sample_index=positions[name].sample_index + count)
    return PhasePlan(
        name=phase.name,
        first_step=first.first_step,
        last_step=last.last_step,
        num_samples=samples,
        tokens=samples * length,
        lr_first=schedule.rate(first.first_step),
        lr_last=schedule.rate(last.last_step),
        sources=uses,
        seq_length=length,
        segments=segments,
        ends={name: step_of_sample(segments, first.first_sample + done) for name, done in ended.items()},
    )


def _shortage_problems(index: int, phase: PhasePlan) -> Iterator[Problem]:
    """Yield the problem of a phase that continues after all its sources have ended."""
    given = sum(use.samples for use in phase.sources.values())
    if phase.ends and given < phase.num_samples:
        text = (
            f"phases[{index}] (phase {phase.name}): all its sources reach max_epochs by step "
            f"{max(phase.ends.values()):,}, but it runs to step {phase.last_step:,} "
            f"({phase.num_samples - given:,} samples are missing); raise max_epochs, add a source or shorten the run"
        )
        yield Problem(text, ("sources", "phases", *SCHEDULE_KEYS))


def batch_problems(config: RunConfig, phases: Sequence[PhasePlan], num_gpus: int) -> Iterator[Problem]:
    """Yield batches of ramp-up and phases that do not divide over the ranks.

    `layout_problems` checks `batch.global` itself.
    """
    replica = config.parallel.model_parallel_size
    if num_gpus % replica:
        return
    for phase in phases:
        usual = (config.batch.global_, config.batch.micro)
        own = [segment for segment in phase.segments if (segment.global_batch, segment.micro_batch) != usual]
        uneven = [s.global_batch for s in own if not _divides(config, s, num_gpus // replica)]
        if uneven:
            shown = ", ".join(f"{size:,}" for size in uneven[:4]) + (" ..." if len(uneven) > 4 else "")
            text = f"phase {phase.name}: the batch of {shown} does not divide into micro-batches of "
            ranks = format_number_of(num_gpus, "rank")
            text += f"{own[0].micro_batch} on {num_gpus // replica} replicas ({ranks} of {replica} each)"
            if config.parallel.virtual_pipeline > 1:
                text += f", a multiple of parallel.pipeline: {config.parallel.pipeline} on each"
            yield Problem(
                f"{text}; change batch.ramp_up, phases[*].batch or the number of ranks", ("parallel", "batch", "phases")
            )


def _divides(config: RunConfig, segment: Segment, replicas: int) -> bool:
    """Return True if the batch divides over the replicas, or if config/checks.py reports that it does not."""
    if segment.global_batch % segment.micro_batch and not (
        segment.is_ramp and segment.micro_batch != config.batch.micro
    ):
        return True
    micro_batches, rest = divmod(segment.global_batch, segment.micro_batch * replicas)
    is_interleaved = config.parallel.virtual_pipeline > 1
    return rest == 0 and not (is_interleaved and micro_batches % config.parallel.pipeline)
