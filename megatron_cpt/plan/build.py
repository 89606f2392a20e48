"""A configuration and the sizes of its sources -> the whole plan of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_cpt.config import RunConfig
from megatron_cpt.plan.flops import FlopsPerToken, flops_per_token
from megatron_cpt.plan.layout import Layout, layout_problems
from megatron_cpt.plan.memory import GIB, Memory, estimate_memory
from megatron_cpt.plan.parameters import Parameters, count_parameters
from megatron_cpt.plan.phases import PhasePlan, plan_phases
from megatron_cpt.plan.problem import Problem
from megatron_cpt.plan.schedule import Schedule, schedule_problems
from megatron_cpt.plan.sources import (
    SourceTotal,
    epoch_problems,
    sample_limits,
    samples_in_epoch,
    size_problems,
    source_warnings,
)


@dataclass(frozen=True)
class RunPlan:
    """What a run will do, before anything runs.

    Attributes:
        name: the run's name.
        steps: its steps.
        tokens: the tokens that were asked for.
        tokens_per_step: global batch x seq_length.
        schedule: the learning rate of every step.
        phases: in order; where there are no problems they tile steps 1 to `steps`.
        sources: what is read of each source over all phases.
        parameters: of the model, by part.
        flops: of training on one token.
        layout: the ranks it was planned for.
        memory: of the pipeline stage that needs most.
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
    memory: Memory
    warnings: Sequence[str]
    problems: Sequence[Problem]

    @property
    def tokens_trained(self) -> int:
        """Tokens of all steps: `tokens`, rounded up to whole steps."""
        return self.steps * self.tokens_per_step

    @property
    def sample_limits(self) -> dict[str, int]:
        """Samples after which a source ends, for those that do."""
        return {name: total.limit for name, total in self.sources.items() if total.limit is not None}

    def phase_of(self, step: int) -> PhasePlan:
        """The phase that a step (from 1) belongs to."""
        assert 1 <= step <= self.steps, f"step {step} is not of this run"
        return next(phase for phase in self.phases if step <= phase.last_step)

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
            "layout": asdict(self.layout),
            "schedule": asdict(self.schedule),
            "phases": [asdict(phase) for phase in self.phases],
            "sources": {name: asdict(total) for name, total in self.sources.items()},
            "warnings": list(self.warnings),
        }


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
        samples_per_epoch: sequences in one pass over a source, where known better than from its size alone (a source
            of many files loses the end of each).
        num_gpus: ranks to estimate memory for; left out: one replica of the model.

    Returns:
        The plan with its problems; nothing is raised.
    """
    epochs = {name: samples_in_epoch(tokens, config.seq_length) for name, tokens in source_tokens.items()}
    epochs |= samples_per_epoch or {}
    schedule = Schedule.build(config)
    problems = list(schedule_problems(config.schedule, schedule))
    phases, phase_problems = plan_phases(config, schedule, epochs)
    totals = _total(config, phases, source_tokens, epochs)
    phase_problems += epoch_problems(totals, {phase.name: phase.sources for phase in phases})
    # Of a schedule that is wrong itself no rate counts, nor where it is reached.
    problems += [found for found in phase_problems if not (problems and "schedule" in found.keys)]
    problems += size_problems(source_tokens, epochs, config.seq_length)
    if num_gpus is not None:
        problems += layout_problems(config, num_gpus)
    layout = Layout.build(config, num_gpus)
    return RunPlan(
        name=config.name,
        steps=config.steps,
        tokens=config.tokens,
        tokens_per_step=config.tokens_per_step,
        schedule=schedule,
        phases=tuple(phases),
        sources=totals,
        parameters=count_parameters(config.model),
        flops=flops_per_token(config.model, config.seq_length),
        layout=layout,
        memory=estimate_memory(config, layout),
        warnings=(*_schedule_warnings(config), *source_warnings(totals), *_end_warnings(config, phases)),
        problems=tuple(problems),
    )


def _total(
    config: RunConfig, phases: Sequence[PhasePlan], source_tokens: Mapping[str, int], epochs: Mapping[str, int]
) -> dict[str, SourceTotal]:
    totals, limits = {}, sample_limits(config.sources, epochs)
    for name, source in config.sources.items():
        samples = sum(phase.sources[name].samples for phase in phases if name in phase.sources)
        epoch = epochs.get(name)
        totals[name] = SourceTotal(
            size=source_tokens.get(name),
            samples=samples,
            tokens=samples * config.seq_length,
            epochs=samples / epoch if epoch else None,
            max_epochs=source.max_epochs,
            limit=limits.get(name),
        )
    return totals


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
