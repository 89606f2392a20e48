"""Prediction for a planned run: its held-out losses, other points of its last switch, other shares of a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_cpt.config import RunConfig
from megatron_cpt.errors import UserError
from megatron_cpt.law.finished_runs import are_same_paths, compared_values, data_paths, trunk_key
from megatron_cpt.law.fitted_law import CONFIDENCE, LossForecast, RunLaw, jackknife_variance
from megatron_cpt.law.run_path import RunPath, path_of_plan
from megatron_cpt.law.student_t import quantile
from megatron_cpt.planning.run_plan import RunPlan
from megatron_cpt.planning.timeline.epochs import REPEAT_LIMIT

FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)
"""Learning rates at which the switch is tried, as fractions of max_lr."""


@dataclass(frozen=True)
class Alternative:
    """A change of the run and what it does to the final losses.

    Attributes:
        change: the change, as text.
        step: last step before the switch; None: another blend.
        losses: final loss per held-out source.
        difference: relative change of the losses from the run as planned, the mean over the held-out sources.
        difference_width: half the width of its interval.
        repeats: sources read more often than their limit, as text.
    """

    change: str
    step: int | None
    losses: Mapping[str, float]
    difference: float
    difference_width: float
    repeats: str


@dataclass(frozen=True)
class RunPrediction:
    """Expected held-out losses of a run.

    Attributes:
        path: its path.
        forecasts: by held-out source.
        switches: other points of the last switch, earliest first; the run's own point has `difference` 0.
        blends: other shares of a source in the last phase.
        notes: how the run leaves the range of the fitted runs, and other reasons for doubt.
    """

    path: RunPath
    forecasts: Mapping[str, LossForecast]
    switches: Sequence[Alternative]
    blends: Sequence[Alternative]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `plan --json`."""
        return {
            "confidence": CONFIDENCE,
            "tokens": self.path.tokens.tolist(),
            "held_out": {
                name: {
                    "start": one.start,
                    "final": float(one.loss[-1]),
                    "low": float(one.low[-1]),
                    "high": float(one.high[-1]),
                    "losses": one.loss.tolist(),
                    "lows": one.low.tolist(),
                    "highs": one.high.tolist(),
                }
                for name, one in self.forecasts.items()
            },
            "switches": [asdict(one) for one in self.switches],
            "blends": [asdict(one) for one in self.blends],
            "notes": list(self.notes),
        }


def predict_run(
    law: RunLaw, config: RunConfig, plan: RunPlan, *, shares: Mapping[str, Sequence[float]] | None = None
) -> RunPrediction:
    """Predict the held-out losses of a planned run.

    Args:
        shares: shares of a source in the last phase to try, by source.

    Raises:
        UserError: the law is of another model, tokenizer, batch or sequence length, does not know a source, or expects
            no finite loss.
    """
    _check_same(law, config)
    steps = _switch_steps(plan)
    with np.errstate(over="ignore", invalid="ignore"):  # far beyond the fitted runs; refused below
        path = path_of_plan(plan.to_dict(), at=steps)
        own = _Outcome(path, law.forecast(path))
        switches = tuple(_switches(law, plan, own, steps))
        blends = tuple(_blends(law, plan, own, shares or {}))
        highest = [one.high.max() for one in own.forecasts.values()]
    for tried in (*switches, *blends):
        highest += [*tried.losses.values(), tried.difference, tried.difference_width]
    if not np.isfinite(highest).all():
        raise UserError(
            "--predict: no finite loss is expected for this run: the sum of learning rate x tokens is "
            f"{path.areas[-1] / law.fitted.area:.3g} times the largest fitted one; fit longer runs, or lower "
            "schedule.max_lr or tokens"
        )
    return RunPrediction(
        path=path,
        forecasts=own.forecasts,
        switches=switches,
        blends=blends,
        notes=tuple(_notes(law, config, path)),
    )


@dataclass(frozen=True)
class _Outcome:
    """Path of a run with its forecasts."""

    path: RunPath
    forecasts: Mapping[str, LossForecast]

    def alternative(self, law: RunLaw, plan: RunPlan, path: RunPath, change_text: str, step: int | None) -> Alternative:
        """Compare another path of the same learning rates with this one."""
        other = law.forecast(path)
        change = [one.change[-1] - self.forecasts[name].change[-1] for name, one in other.items()]
        without = [one.without[:, -1] - self.forecasts[name].without[:, -1] for name, one in other.items()]
        spread = np.sqrt(jackknife_variance(np.mean(without, axis=0)))
        return Alternative(
            change=change_text,
            step=step,
            losses={name: float(one.loss[-1]) for name, one in other.items()},
            difference=float(np.mean(change)),
            difference_width=float(quantile(CONFIDENCE, len(law.arms) - 1) * spread),
            repeats=", ".join(_repeats(plan, path)),
        )


def _check_same(law: RunLaw, config: RunConfig) -> None:
    own = compared_values(config.to_dict())
    differing = [key for key, value in law.compared.items() if own.get(key) != value]
    if differing:
        key = differing[0]
        raise UserError(
            f"--predict: {', '.join(differing)}: the fitted runs have other values, and the law holds only for those "
            f"({key} is {own.get(key)!r}, there {law.compared[key]!r}); fit runs of this model and batch"
        )


def _notes(law: RunLaw, config: RunConfig, path: RunPath) -> Iterator[str]:
    yield from law.warnings
    for text in law.outside(path):
        yield f"outside the fitted runs: {text}"
    trunk = str(config.init.from_)
    if trunk_key(trunk) not in map(trunk_key, law.trunks):
        yield f"init.from is {trunk}, but the losses hold for the trunk of the fitted runs: {', '.join(law.trunks)}"
    yield from _other_data(law, config)
    if path.areas[-1] > law.fitted.area and any(one.error_per_doubling is None for one in law.held_out):
        yield "the fitted runs have too few points to measure the error beyond them; the intervals may be too narrow"


def _other_data(law: RunLaw, config: RunConfig) -> Iterator[str]:
    """Yield a sentence for each source that has the name of a fitted one, but other paths."""
    for key, named in data_paths(config.to_dict()).items():
        for name, paths in named.items():
            fitted = law.data[key].get(name)
            if fitted is not None and not are_same_paths(paths, fitted):
                yield (
                    f"{key}.{name} is {', '.join(paths)}, in the fitted runs {', '.join(fitted)}: the losses hold only "
                    "for the fitted data; fit runs of this data, or ignore this if it is a copy"
                )


def _switch_steps(plan: RunPlan) -> dict[int, str]:
    """Return steps at which the switch is tried, with their description: at learning rates, or else at tenths."""
    schedule = plan.schedule
    found = {schedule.last_step_above(f * schedule.max_lr): f"rate {f:g} of max_lr" for f in FRACTIONS}
    found.pop(plan.steps, None)  # a rate that the run does not reach
    return found or {plan.steps * tenth // 10: f"after {tenth}/10 of the steps" for tenth in range(1, 10)}


def _switches(law: RunLaw, plan: RunPlan, own: _Outcome, tried: Mapping[int, str]) -> Iterator[Alternative]:
    """Yield the last switch of the run at other learning rates, at its own, and without a first or second blend."""
    if len(plan.phases) < 2:
        return
    before, after, ends = plan.phases[-2], plan.phases[-1], own.path.steps[1:]
    steps = {before.first_step - 1: f"{after.name} from step {before.first_step:,}"}
    steps |= {step: change for step, change in tried.items() if step >= before.first_step}
    steps[plan.steps] = f"{before.name} to the end"
    steps[before.last_step] = f"as planned: rate {before.lr_last / plan.schedule.max_lr:.3g} of max_lr"
    for step, change in sorted(steps.items()):
        shares = own.path.shares.copy()
        is_last_two = ends >= before.first_step
        shares[is_last_two & (ends <= step)] = _row(own.path, before.weights)
        shares[is_last_two & (ends > step)] = _row(own.path, after.weights)
        yield own.alternative(law, plan, replace(own.path, shares=shares), change, step)


def _blends(law: RunLaw, plan: RunPlan, own: _Outcome, wanted: Mapping[str, Sequence[float]]) -> Iterator[Alternative]:
    last = plan.phases[-1]
    for name, shares in wanted.items():
        rest = {source: weight for source, weight in last.weights.items() if source != name}
        if not rest:
            raise UserError(f"--blend {name}: it is the only source of phase {last.name}; name another one")
        path = own.path.with_sources(tuple(dict.fromkeys((*own.path.sources, name))))
        for share in shares:
            left = (1.0 - share) / sum(rest.values())
            changed = path.shares.copy()
            weights = {source: weight * left for source, weight in rest.items()} | {name: share}
            changed[path.steps[1:] >= last.first_step] = _row(path, weights)
            text = f"{name} {share:g} in {last.name}"
            yield own.alternative(law, plan, replace(path, shares=changed), text, None)


def _row(path: RunPath, weights: Mapping[str, float]) -> Sequence[float]:
    return [weights.get(name, 0.0) for name in path.sources]


def _repeats(plan: RunPlan, path: RunPath) -> Iterator[str]:
    """Yield the sources that a path reads more often than `max_epochs`, or else four times."""
    tokens = (path.shares * np.diff(path.tokens)[:, None]).sum(axis=0)
    for name, read in zip(path.sources, tokens, strict=True):
        total = plan.sources.get(name)
        if total is None or not total.size:
            continue
        epochs = read / total.size
        if epochs > (total.max_epochs or REPEAT_LIMIT) + 1e-6:
            yield f"{name} {epochs:.1f} epochs"
