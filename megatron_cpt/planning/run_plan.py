"""Plan of a run, computed from its configuration and the sizes of its sources."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_cpt.config import RunConfig, format_count
from megatron_cpt.config.knobs import GPU_CLUSTER, resolve_speed
from megatron_cpt.planning.cost.memory import GIB, Memory, stage_memories
from megatron_cpt.planning.cost.parameters import FlopsPerToken, Parameters, count_parameters, flops_per_token
from megatron_cpt.planning.cost.rank_layout import Layout, layout_problems
from megatron_cpt.planning.cost.teacher_cost import CacheCost, TeacherCost, distilled_share, teacher_cost
from megatron_cpt.planning.hardware import Gpu
from megatron_cpt.planning.problem import Problem
from megatron_cpt.planning.timeline.epochs import (
    SourceTotal,
    epoch_problems,
    listed,
    samples_in_epoch,
    size_problems,
    source_warnings,
    span_limits,
)
from megatron_cpt.planning.timeline.phases import PhasePlan, SourcePosition, batch_problems, plan_phases
from megatron_cpt.planning.timeline.schedule import SCHEDULE_KEYS, Schedule, schedule_problems
from megatron_cpt.planning.timeline.segments import RunProgress, Segment
from megatron_cpt.planning.timeline.solve_steps import solve_schedule
from megatron_cpt.sampling.spans import SpanGrid

_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run.

    Attributes:
        tokens: requested tokens, before rounding up to whole steps.
        tokens_per_step: for `batch.global` and `seq_length`; `segments` has the sizes of all steps.
        phases: in order; without problems they cover steps 1 to `steps`.
        sources: tokens read of each source over all phases.
        flops: of training on one token; the mean over all tokens if sequence lengths differ.
        memory_stages: memory of every pipeline stage, in the phase that needs most.
        teacher: parameters and FLOPs of the teacher; None if no teacher runs beside the model.
        teacher_cache: size and reads of a cached teacher; None without one. `prepare` knows it.
        evaluation_steps: steps after which the tasks of section `evaluation` are measured; 0 is before the first step.
        warnings: messages about settings that are allowed but may be mistakes.
        problems: reasons why the run cannot start; the caller raises them.
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
    teacher: TeacherCost | None
    evaluation_steps: Sequence[int]
    warnings: Sequence[str]
    problems: Sequence[Problem]
    teacher_cache: CacheCost | None = None

    @property
    def tokens_trained(self) -> int:
        """Tokens of all steps: `tokens` rounded up to whole steps."""
        return self.segments[-1].end.tokens

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Consecutive steps of equal batch and sequence length."""
        return tuple(segment for phase in self.phases for segment in phase.segments)

    @property
    def is_uniform(self) -> bool:
        """True if all steps have the same global batch and sequence length."""
        return len({(segment.global_batch, segment.seq_length) for segment in self.segments}) == 1

    @property
    def ramp(self) -> tuple[Segment, ...]:
        """Segments of the batch ramp-up; empty without one."""
        return tuple(segment for segment in self.segments if segment.is_ramp)

    @property
    def step_sizes(self) -> str:
        """Tokens per step as text: `4.72M`, or `1.57M to 4.72M` if steps differ."""
        sizes = [segment.tokens_per_step for segment in self.segments]
        least, most = format_count(min(sizes)), format_count(max(sizes))
        return most if least == most else f"{least} to {most}"

    def segment_of(self, step: int) -> Segment:
        """Return the segment of a step, counted from 1."""
        assert 1 <= step <= self.steps, f"step {step} is outside the run"
        return next(segment for segment in self.segments if step <= segment.last_step)

    def segment_from(self, samples: int) -> Segment:
        """Return the segment of the step that starts after `samples` samples."""
        return next(segment for segment in self.segments if samples < segment.end.samples)

    def after(self, step: int) -> RunProgress:
        """Return steps, samples and tokens done after a step; all 0 after step 0."""
        return self.segment_of(step).after(step) if step else RunProgress()

    @property
    def span_limits(self) -> dict[str, int]:
        """Number of spans per source after which it ends, for sources with `on_exhausted: renormalize`."""
        return {name: total.limit for name, total in self.sources.items() if total.limit is not None}

    def phase_of(self, step: int) -> PhasePlan:
        """Return the phase of a step, counted from 1."""
        assert 1 <= step <= self.steps, f"step {step} is outside the run"
        return next(phase for phase in self.phases if step <= phase.last_step)

    @property
    def memory(self) -> Memory:
        """Memory of the pipeline stage that needs most."""
        return max(self.memory_stages, key=lambda memory: memory.total)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `plan --json` and plan.json."""
        return {
            "name": self.name,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_trained": self.tokens_trained,
            "tokens_per_step": self.tokens_per_step,
            "parameters": self.parameters.total,
            "parameters_by_part": self.parameters.to_dict(),
            "flops_per_token": asdict(self.flops),
            "flops": {kind: value * self.tokens_trained for kind, value in asdict(self.flops).items()},
            "memory_per_gpu_gib": self.memory.total / GIB,
            "memory_by_part_gib": self.memory.to_dict(),
            "memory_by_stage_gib": [{**stage.to_dict(), "total": stage.total / GIB} for stage in self.memory_stages],
            "teacher": self.teacher and asdict(self.teacher),
            "teacher_cache": self.teacher_cache and asdict(self.teacher_cache),
            "layout": asdict(self.layout),
            "schedule": asdict(self.schedule),
            "phases": [_with_file_keys(asdict(phase)) for phase in self.phases],
            "sources": {name: _with_file_keys(asdict(total)) for name, total in self.sources.items()},
            "evaluation_steps": list(self.evaluation_steps),
            "warnings": list(self.warnings),
        }


# plan.json is a file format: `trace` reads these keys, also from files of earlier versions.
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
    """Plan a run; problems are in the result, not raised.

    Args:
        source_tokens: tokens of each source; a source without an entry has no epochs and no limit.
        samples_per_epoch: spans per epoch of a source, if known more exactly than from its size: a source of several
            files loses the end of each file.
        num_gpus: ranks to estimate memory for; None means one replica of the model.
    """
    grids = _span_grids(config, source_tokens, samples_per_epoch or {})
    schedule = solve_schedule(config)
    problems = list(schedule_problems(config.schedule, schedule))
    phases, found_problems, positions = plan_phases(config, schedule, grids)
    segments = [segment for phase in phases for segment in phase.segments]
    totals = _source_totals(config, phases, positions, source_tokens, grids)
    found_problems += epoch_problems(totals, {phase.name: phase.sources for phase in phases})
    # Problems that follow from an invalid schedule, such as a rate that is never reached, are not reported.
    problems += [found for found in found_problems if not (problems and "schedule" in found.keys)]
    problems += size_problems(source_tokens, grids)
    problems += batch_problems(config, phases, num_gpus or config.parallel.model_parallel_size)
    if num_gpus is not None:
        problems += layout_problems(config, num_gpus)
    problems += _profile_problems(config, schedule.steps, num_gpus)
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
        memory_stages=peak_memories(config, segments, num_gpus),
        teacher=teacher_cost(config),
        evaluation_steps=_evaluation_steps(config, phases, schedule.steps),
        warnings=(
            *_schedule_warnings(config),
            *_blend_warnings(config),
            *_shape_warnings(config, segments),
            *_teacher_warnings(config),
            *source_warnings(totals),
            *_end_warnings(config, phases),
            *_ema_warnings(config, schedule.steps),
        ),
        problems=tuple(problems),
    )


def _evaluation_steps(config: RunConfig, phases: Sequence[PhasePlan], last_step: int) -> tuple[int, ...]:
    section = config.evaluation
    if section is None:
        return ()
    ends = [phase.last_step for phase in phases[:-1]]
    points = {"start": [0], "switch": ends, "end": [last_step]}
    every = [] if section.every is None else range(section.every, last_step + 1, section.every)
    return tuple(sorted({*every, *(step for name in section.at for step in points[name])}))


def _profile_problems(config: RunConfig, steps: int, num_gpus: int | None) -> Iterator[Problem]:
    profile = config.profile
    if profile is None:
        return
    if profile.steps[1] > steps:
        text = f"profile.steps: {list(profile.steps)} is outside the run, which has {steps:,} steps"
        yield Problem(f"{text}; choose earlier steps or remove profile", ("profile.steps", *SCHEDULE_KEYS))
    outside = [str(rank) for rank in profile.ranks or () if num_gpus is not None and rank >= num_gpus]
    if outside:
        text = f"profile.ranks: no rank {listed(outside)} in a job of {num_gpus}; ranks count from 0"
        yield Problem(f"{text}: choose others or remove ranks", ("profile.ranks",))


def _span_grids(
    config: RunConfig, source_tokens: Mapping[str, int], samples_per_epoch: Mapping[str, int]
) -> dict[str, SpanGrid]:
    """Return the grid of spans per source of known size; a source shorter than one span has an empty grid."""
    lengths = {name: config.span_length(name) for name in {**source_tokens, **samples_per_epoch}}
    known = {name: samples_in_epoch(tokens, lengths[name]) for name, tokens in source_tokens.items()}
    known |= samples_per_epoch
    return {name: SpanGrid(lengths[name], spans) for name, spans in known.items()}


def _mean_flops(config: RunConfig, phases: Sequence[PhasePlan]) -> FlopsPerToken:
    # FLOPs are linear in the length, so the mean length over all tokens gives their mean.
    length = sum(phase.seq_length * phase.tokens for phase in phases) / sum(phase.tokens for phase in phases)
    return flops_per_token(config.model, length)


def with_shape(config: RunConfig, segment: Segment) -> RunConfig:
    """Return the run with the batch and sequence length of one segment in all steps.

    `tp_comm_overlap` is resolved before: it needs the same shape in all phases of the original run.
    """
    batch = config.batch.model_copy(
        update={"global_": segment.global_batch, "micro": segment.micro_batch, "ramp_up": None}
    )
    overlaps = "tp_comm_overlap" in resolve_speed(config, GPU_CLUSTER)[0]
    speed = config.speed.model_copy(update={"tp_comm_overlap": overlaps})
    return config.model_copy(update={"batch": batch, "seq_length": segment.seq_length, "speed": speed})


def peak_memories(
    config: RunConfig, segments: Sequence[Segment], num_gpus: int | None, gpu: Gpu | None = None
) -> Sequence[Memory]:
    """Return the memory of every pipeline stage, in the steps that need most."""
    # Among steps that differ only in their batch, the largest batch keeps the most micro-batches in flight.
    by_batch = sorted(segments, key=lambda segment: segment.global_batch)
    shapes = {(segment.micro_batch, segment.seq_length): segment for segment in by_batch}
    runs = [with_shape(config, segment) for segment in shapes.values()]
    estimates = [stage_memories(run, Layout.build(run, num_gpus), gpu=gpu) for run in runs]
    return max(estimates, key=lambda stages: max(stage.total for stage in stages))


def _source_totals(
    config: RunConfig,
    phases: Sequence[PhasePlan],
    positions: Mapping[str, SourcePosition],
    source_tokens: Mapping[str, int],
    grids: Mapping[str, SpanGrid],
) -> dict[str, SourceTotal]:
    totals, limits = {}, span_limits(config.sources, grids)
    for name, source in config.sources.items():
        uses = [phase.sources[name] for phase in phases if name in phase.sources]
        grid, position, epochs = grids.get(name), positions.get(name), None
        if grid is not None and grid.num_spans:
            epochs = 0.0
            if position is not None:
                epochs = position.sample_index / (grid.num_spans * grid.parts(position.seq_length))
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
            f"batch.ramp_up: the run ends with a batch of {segments[-1].global_batch:,}, after too few samples to "
            f"reach batch.global: {config.batch.global_:,}"
        )
    known, longest = config.model.max_positions or config.seq_length, config.longest_sequence
    if longest > known:
        which = "model.max_positions" if config.model.max_positions else "seq_length"
        yield (
            f"sequences of {longest:,} tokens have positions beyond {which}: {known:,}, new to the model; "
            "check model.rotary_base and model.rope_scaling"
        )


def _ema_warnings(config: RunConfig, steps: int) -> Iterator[str]:
    if config.ema is not None and config.ema.every > steps:
        yield (
            f"ema.every: {config.ema.every:,} is above the {steps:,} steps of the run, so the moving average keeps "
            "its first value; choose a smaller number"
        )


def _teacher_warnings(config: RunConfig) -> Iterator[str]:
    teacher = config.teacher
    if teacher is None:
        return
    if distilled_share(config) == 0:
        yield "teacher: all sources that a phase reads have a factor of 0 in teacher.sources; the teacher has no effect"
    if config.teacher_checkpoint is not None and teacher.model is None:
        yield "teacher: planned with the shape of the model, because its checkpoint cannot be read here"
    known = teacher.model.max_positions if teacher.model is not None else None
    if known is not None and config.longest_sequence > known:
        yield (
            f"teacher: sequences of {config.longest_sequence:,} tokens have positions beyond the {known:,} that it "
            "knows; its distributions there may be poor"
        )


def _schedule_warnings(config: RunConfig) -> Iterator[str]:
    schedule = config.schedule
    for key in sorted(schedule.model_fields_set & {"decay", "decay_shape"}):
        if schedule.shape != "wsd":
            yield f"schedule.{key} has no effect with schedule.shape: {schedule.shape}; remove it"


def _blend_warnings(config: RunConfig) -> Iterator[str]:
    for phase in config.phases:
        total = sum(phase.blend.values())
        if not math.isclose(total, 1.0, rel_tol=_SUM_TOLERANCE):
            percent = " (percent)" if math.isclose(total, 100.0, rel_tol=_SUM_TOLERANCE) else ""
            yield (
                f"phase {phase.name}: the weights of its blend add up to {total:g}{percent}, not 1; each is divided by "
                "the sum"
            )


def _end_warnings(config: RunConfig, phases: Sequence[PhasePlan]) -> Iterator[str]:
    first_ends: dict[str, tuple[int, str]] = {}
    for phase in phases:
        first_ends = {name: (step, phase.name) for name, step in phase.ends.items()} | first_ends
    for name, (step, phase_name) in first_ends.items():
        yield (
            f"source {name}: ends after {config.sources[name].max_epochs:g} epochs, at about step {step:,} (phase "
            f"{phase_name}); from then on the other sources of the blend share its weight"
        )
