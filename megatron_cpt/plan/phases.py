"""Where each phase begins and ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megatron_cpt.config import PhaseConfig, RunConfig, Until, format_count
from megatron_cpt.plan.problem import Problem
from megatron_cpt.plan.schedule import LENGTH_KEYS, SCHEDULE_KEYS, Schedule
from megatron_cpt.plan.sources import SourceUse, normalise, sample_limits, share_out


@dataclass(frozen=True)
class PhasePlan:
    """A phase resolved into steps.

    Attributes:
        name: its name.
        first_step: its first step, counted from 1 over the whole run.
        last_step: its last step.
        num_samples: sequences in it.
        tokens: tokens trained in it.
        lr_first: rate of the first step.
        lr_last: rate of the last step.
        sources: what it reads, by source in the order of the blend.
        ends: by source that has ended (`on_exhausted: renormalize`) the step, to a few, from which it gives nothing.
    """

    name: str
    first_step: int
    last_step: int
    num_samples: int
    tokens: int
    lr_first: float
    lr_last: float
    sources: Mapping[str, SourceUse]
    ends: Mapping[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, float]:
        """The blend; the shares sum to 1."""
        return {name: use.weight for name, use in self.sources.items()}

    @property
    def num_steps(self) -> int:
        """Steps in it."""
        return self.last_step - self.first_step + 1


def plan_phases(
    config: RunConfig, schedule: Schedule, samples_per_epoch: Mapping[str, int]
) -> tuple[list[PhasePlan], list[Problem]]:
    """Resolve the phases of a run; without problems they tile its steps.

    Args:
        config: the run; its blends may name unknown sources or bad weights, which the configuration's checks report.
        schedule: its learning rates.
        samples_per_epoch: by source, as far as known.

    Returns:
        The phases that have at least one step, and what is wrong with the others.
    """
    phases: list[PhasePlan] = []
    problems: list[Problem] = []
    room = sample_limits(config.sources, samples_per_epoch)
    first = 1
    for index, phase in enumerate(config.phases):
        last, problem = _last_step(config, schedule, index, first)
        if problem is not None:
            problems.append(problem)
        if first <= last:
            planned = _plan_phase(config, schedule, phase, (first, last), samples_per_epoch, room)
            problems += _shortage(index, planned)
            phases.append(planned)
            room = {name: left - _samples(planned, name) for name, left in room.items()}
        first = max(first, last + 1)
    return phases, problems


def end_of(until: Until, schedule: Schedule, tokens_per_step: int) -> int:
    """The last step of a phase, wherever it lies: it may be beyond the run."""
    if until.lr is not None:
        return schedule.last_step_above(until.lr * schedule.max_lr)
    if until.tokens is not None:
        return -(-until.tokens // tokens_per_step)
    assert until.step is not None
    return until.step


def _last_step(config: RunConfig, schedule: Schedule, index: int, first: int) -> tuple[int, Problem | None]:
    """The last step of phase number `index`, within the run, and what is wrong with it."""
    phase, steps = config.phases[index], schedule.steps
    is_last = index == len(config.phases) - 1
    if phase.until is None or is_last:
        # A missing `until` before the last phase, or one on it, is reported by the configuration's checks.
        return (steps if is_last else first), None
    last = end_of(phase.until, schedule, config.tokens_per_step)
    unit = "lr" if phase.until.lr is not None else "tokens" if phase.until.tokens is not None else "step"
    keys = (f"phases[{index}].until", *(SCHEDULE_KEYS if unit == "lr" else LENGTH_KEYS))
    key = f"phases[{index}].until (phase {phase.name}): {_describe(phase.until)}"
    if last < first:
        text = f"{key} is step {last:,}, but the phase before ends with step {first - 1:,}: no step is left for it"
        return last, Problem(f"{text}; `until` counts from the start of the run: choose a later end", keys)
    if last >= steps:
        if unit == "lr":
            floor = schedule.rate(steps) / schedule.max_lr
            text = f"{key} of max_lr is never reached: the last step still runs at {floor:.3g} of it"
            return steps, Problem(f"{text}; choose a larger fraction, or tokens or step", keys)
        text = f"{key} is step {last:,}, but the run ends with step {steps:,}: no step is left for the next phase"
        return steps, Problem(f"{text}; choose an earlier end or raise tokens", keys)
    return last, None


def _describe(until: Until) -> str:
    if until.lr is not None:
        return f"lr: {until.lr:g}"
    return f"tokens: {format_count(until.tokens)}" if until.tokens is not None else f"step: {until.step}"


def _plan_phase(
    config: RunConfig,
    schedule: Schedule,
    phase: PhaseConfig,
    steps: tuple[int, int],
    samples_per_epoch: Mapping[str, int],
    room: Mapping[str, int],
) -> PhasePlan:
    """A phase, read as if sources with a bad weight (the configuration's checks report them) were not in it."""
    first, last = steps
    samples = (last - first + 1) * config.batch.global_
    weights = normalise({name: weight for name, weight in phase.blend.items() if math.isfinite(weight) and weight > 0})
    counts, ended = share_out(weights, samples, room)
    uses = {}
    for name, count in counts.items():
        epoch = samples_per_epoch.get(name)
        uses[name] = SourceUse(weights[name], count, count * config.seq_length, count / epoch if epoch else None)
    return PhasePlan(
        name=phase.name,
        first_step=first,
        last_step=last,
        num_samples=samples,
        tokens=samples * config.seq_length,
        lr_first=schedule.rate(first),
        lr_last=schedule.rate(last),
        sources=uses,
        ends={name: first + done // config.batch.global_ for name, done in ended.items()},
    )


def _samples(phase: PhasePlan, source: str) -> int:
    return phase.sources[source].samples if source in phase.sources else 0


def _shortage(index: int, phase: PhasePlan) -> Iterator[Problem]:
    """A phase that goes on after all its sources have ended."""
    given = sum(use.samples for use in phase.sources.values())
    if phase.ends and given < phase.num_samples:
        text = (
            f"phases[{index}] (phase {phase.name}): all its sources have given their max_epochs by step "
            f"{max(phase.ends.values()):,}, but it runs to step {phase.last_step:,} "
            f"({phase.num_samples - given:,} samples are missing); raise max_epochs, add a source or shorten the run"
        )
        yield Problem(text, ("sources", "phases", *SCHEDULE_KEYS))
