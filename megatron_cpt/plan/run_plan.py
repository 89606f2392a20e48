"""A configuration and the sizes of its sources -> the whole plan of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_cpt.config import RunConfig, format_count
from megatron_cpt.plan.cost.flops import FlopsPerToken, flops_per_token
from megatron_cpt.plan.cost.memory import GIB, Memory, stage_memories
from megatron_cpt.plan.cost.parameters import Parameters, count_parameters
from megatron_cpt.plan.cost.rank_layout import Layout, layout_problems
from megatron_cpt.plan.problem import Problem
from megatron_cpt.plan.timeline.epochs import (
    SourceTotal,
    epoch_problems,
    samples_in_epoch,
    size_problems,
    source_warnings,
    span_limits,
)
from megatron_cpt.plan.timeline.phases import PhasePlan, PlannedPhases, batch_problems, plan_phases
from megatron_cpt.plan.timeline.schedule import Schedule, schedule_problems
from megatron_cpt.plan.timeline.segments import Mark, Segment
from megatron_cpt.plan.timeline.solve_steps import solve_schedule
from megatron_cpt.sampling.spans import SpanGrid


@dataclass(frozen=True)
class RunPlan:
    """What a run will do, before anything runs.

    Attributes:
        name: the run's name.
        steps: its steps.
        tokens: the tokens that were asked for.
        tokens_per_step: of the run's own full batch and sequence length; `segments` has those of every step.
        schedule: the learning rate of every step.
        phases: in order; where there are no problems they tile steps 1 to `steps`.
        sources: what is read of each source over all phases.
        parameters: of the model, by part.
        flops: of training on one token; where the sequence length changes, the mean over the run's tokens.
        layout: the ranks it was planned for.
        memory_stages: of every pipeline stage, in the phase that needs most.
        warnings: what may be done but should not go unnoticed.
        problems: what keeps it from running; callers raise them.
    """

    name: str
    steps: int
    tokens: int
    tokens_per_step: int
    schedule: Schedule
    phases: Sequence[PhasePlan]
    sources: Mapping[str, SourceTotal]
    parameters: Parameters
    flops: FlopsPerToken
    layout: Layout
    memory_stages: Sequence[Memory]
    warnings: Sequence[str]
    problems: Sequence[Problem]

    @property
    def tokens_trained(self) -> int:
        """Tokens of all steps: `tokens`, rounded up to whole steps."""
        return self.segments[-1].end.tokens

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The steps of the run by the shape they have: batch and sequence length."""
        return tuple(segment for phase in self.phases for segment in phase.segments)

    @property
    def is_uniform(self) -> bool:
        """Whether all steps have one global batch and one sequence length."""
        return len({(segment.global_batch, segment.seq_length) for segment in self.segments}) == 1

    @property
    def ramp(self) -> tuple[Segment, ...]:
        """The segments before the batch has grown to its full size; none where it does not grow."""
        return tuple(segment for segment in self.segments if segment.is_ramp)

    @property
    def step_sizes(self) -> str:
        """Tokens a step, in words."""
        sizes = [segment.tokens_per_step for segment in self.segments]
        least, most = format_count(min(sizes)), format_count(max(sizes))
        return most if least == most else f"{least} to {most}"

    def segment_of(self, step: int) -> Segment:
        """The segment that a step (from 1) belongs to."""
        assert 1 <= step <= self.steps, f"step {step} is not of this run"
        return next(segment for segment in self.segments if step <= segment.last_step)

    def segment_from(self, samples: int) -> Segment:
        """The segment of the step before which the run has read `samples` samples."""
        return next(segment for segment in self.segments if samples < segment.end.samples)

    def after(self, step: int) -> Mark:
        """What is done after a step; after step 0: nothing."""
        return self.segment_of(step).after(step) if step else Mark()

    @property
    def span_limits(self) -> dict[str, int]:
        """Spans after which a source ends, for those that do."""
        return {name: total.limit for name, total in self.sources.items() if total.limit is not None}

    def phase_of(self, step: int) -> PhasePlan:
        """The phase that a step (from 1) belongs to."""
        assert 1 <= step <= self.steps, f"step {step} is not of this run"
        return next(phase for phase in self.phases if step <= phase.last_step)

    @property
    def memory(self) -> Memory:
        """Of the pipeline stage that needs most."""
        return max(self.memory_stages, key=lambda memory: memory.total)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `plan --json` prints and plan.json holds."""
        return {
            "name": self.name,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_trained": self.tokens_trained,
            "tokens_per_step": self.tokens_per_step,
            "parameters": self.parameters.total,
            "parameters_by_part": self.parameters.to_dict(),
            "flops_per_token": self.flops.to_dict(),
            "flops": {kind: value * self.tokens_trained for kind, value in self.flops.to_dict().items()},
            "memory_per_gpu_gib": self.memory.total / GIB,
            "memory_by_part_gib": self.memory.to_dict(),
            "memory_by_stage_gib": [{**stage.to_dict(), "total": stage.total / GIB} for stage in self.memory_stages],
            "layout": asdict(self.layout),
            "schedule": asdict(self.schedule),
            "phases": [_with_file_keys(asdict(phase)) for phase in self.phases],
            "sources": {name: _with_file_keys(asdict(total)) for name, total in self.sources.items()},
            "warnings": list(self.warnings),
        }


# plan.json is a file format: it keeps the keys that earlier versions wrote and `trace` reads.
_FILE_KEYS = {"segments": "stretches", "span_length": "chunk_length", "spans_per_epoch": "chunks_per_epoch"}


def _with_file_keys(fields: dict[str, Any]) -> dict[str, Any]:
    return {_FILE_KEYS.get(name, name): value for name, value in fields.items()}


def build_plan(
    config: RunConfig,
    source_tokens: Mapping[str, int],
    *,
    samples_per_epoch: Mapping[str, int] | None = None,
    num_gpus: int | None = None,
) -> RunPlan:
    """Plan a run. Pure: the same arguments give the same plan anywhere.

    Args:
        config: the run.
        source_tokens: tokens of each source; one that is left out has no epochs and no limit.
        samples_per_epoch: sequences (the longest ones it is read in) in one pass over a source, where known better
            than from its size alone (a source of many files loses the end of each).
        num_gpus: ranks to estimate memory for; left out: one replica of the model.

    Returns:
        The plan with its problems; nothing is raised.
    """
    grids = _grids(config, source_tokens, samples_per_epoch or {})
    schedule = solve_schedule(config)
    problems = list(schedule_problems(config.schedule, schedule))
    planned = plan_phases(config, schedule, grids)
    phases = planned.phases
    segments = [segment for phase in phases for segment in phase.segments]
    totals = _total(config, planned, source_tokens, grids)
    phase_problems = [*planned.problems, *epoch_problems(totals, {phase.name: phase.sources for phase in phases})]
    # Of a schedule that is wrong itself no rate counts, nor where it is reached.
    problems += [found for found in phase_problems if not (problems and "schedule" in found.keys)]
    problems += size_problems(source_tokens, grids)
    problems += batch_problems(config, phases, num_gpus or config.parallel.model_parallel_size)
    if num_gpus is not None:
        problems += layout_problems(config, num_gpus)
    return RunPlan(
        name=config.name,
        steps=schedule.steps,
        tokens=config.tokens,
        tokens_per_step=config.tokens_per_step,
        schedule=schedule,
        phases=tuple(phases),
        sources=totals,
        parameters=count_parameters(config.model),
        flops=_mean_flops(config, phases),
        layout=Layout.build(config, num_gpus),
        memory_stages=_most_memory(config, phases, num_gpus),
        warnings=(
            *_schedule_warnings(config),
            *_shape_warnings(config, segments),
            *source_warnings(totals),
            *_end_warnings(config, phases),
        ),
        problems=tuple(problems),
    )


def _grids(
    config: RunConfig, source_tokens: Mapping[str, int], samples_per_epoch: Mapping[str, int]
) -> dict[str, SpanGrid]:
    """The spans of each source whose size is known; a source too small for one has none."""
    lengths = {name: config.span_length(name) for name in {**source_tokens, **samples_per_epoch}}
    known = {name: samples_in_epoch(tokens, lengths[name]) for name, tokens in source_tokens.items()}
    known |= samples_per_epoch
    return {name: SpanGrid(lengths[name], spans) for name, spans in known.items()}


def _mean_flops(config: RunConfig, phases: Sequence[PhasePlan]) -> FlopsPerToken:
    by_length = {phase.seq_length: flops_per_token(config.model, phase.seq_length) for phase in phases}
    if len(by_length) == 1:
        return next(iter(by_length.values()))
    tokens = sum(phase.tokens for phase in phases)
    full = sum(by_length[phase.seq_length].full * phase.tokens for phase in phases)
    causal = sum(by_length[phase.seq_length].causal * phase.tokens for phase in phases)
    return FlopsPerToken(full / tokens, causal / tokens)


def _most_memory(config: RunConfig, phases: Sequence[PhasePlan], num_gpus: int | None) -> Sequence[Memory]:
    """The memory of every stage in the phase that needs most."""
    shapes = dict.fromkeys((s.global_batch, s.micro_batch, s.seq_length) for phase in phases for s in phase.segments)
    estimates = []
    for global_, micro, length in shapes:
        batch = config.batch.model_copy(update={"global_": global_, "micro": micro})
        shaped = config.model_copy(update={"batch": batch, "seq_length": length})
        estimates.append(stage_memories(shaped, Layout.build(shaped, num_gpus)))
    return max(estimates, key=lambda stages: max(stage.total for stage in stages))


def _total(
    config: RunConfig, planned: PlannedPhases, source_tokens: Mapping[str, int], grids: Mapping[str, SpanGrid]
) -> dict[str, SourceTotal]:
    totals, limits = {}, span_limits(config.sources, grids)
    for name, source in config.sources.items():
        uses = [phase.sources[name] for phase in planned.phases if name in phase.sources]
        grid, place, epochs = grids.get(name), planned.places.get(name), None
        if grid is not None and grid.num_spans:
            epochs = place.k / (grid.num_spans * grid.parts(place.seq_length)) if place is not None else 0.0
        totals[name] = SourceTotal(
            size=source_tokens.get(name),
            samples=sum(use.samples for use in uses),
            tokens=sum(use.tokens for use in uses),
            epochs=epochs,
            max_epochs=source.max_epochs,
            limit=limits.get(name),
            span_length=config.span_length(name),
            spans_per_epoch=grid.num_spans if grid is not None else None,
        )
    return totals


def _shape_warnings(config: RunConfig, segments: Sequence[Segment]) -> Iterator[str]:
    if segments[-1].is_ramp:
        yield (
            f"batch.ramp_up: the run ends with a batch of {segments[-1].global_batch:,}: it has too few samples to "
            f"reach batch.global: {config.batch.global_:,}"
        )
    known, longest = config.model.max_positions or config.seq_length, config.longest_sequence
    if longest > config.seq_length and longest > known:
        which = "model.max_positions" if config.model.max_positions else "seq_length"
        yield (
            f"sequences of {longest:,} tokens have positions beyond {which}: {known:,}; RoPE turns them as "
            "model.rotary_base and model.rope_scaling say, whatever the model was trained on"
        )


def _schedule_warnings(config: RunConfig) -> list[str]:
    ignored = config.schedule.model_fields_set & {"decay", "decay_shape"}
    if config.schedule.shape == "wsd" or not ignored:
        return []
    return [f"schedule.{key} is not read by schedule.shape: {config.schedule.shape}" for key in sorted(ignored)]


def _end_warnings(config: RunConfig, phases: Sequence[PhasePlan]) -> Iterator[str]:
    first_ends: dict[str, tuple[int, str]] = {}
    for phase in phases:
        first_ends = {name: (step, phase.name) for name, step in phase.ends.items()} | first_ends
    for name, (step, phase_name) in first_ends.items():
        yield (
            f"source {name}: ends after {config.sources[name].max_epochs:g} epochs, about at step {step:,} (phase "
            f"{phase_name}); from there on the others of the blend share its weight"
        )
