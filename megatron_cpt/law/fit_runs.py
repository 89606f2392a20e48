"""Fit of the law on finished runs, with the errors that leaving out runs and cutting them short shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.errors import UserError
from megatron_cpt.law.curve_fit import CurveFit, FitPoints, fit_curve
from megatron_cpt.law.finished_runs import FinishedRun, compared_values
from megatron_cpt.law.fitted_law import FittedRange, HeldOutLaw, RunLaw
from megatron_cpt.law.run_path import Floats, RunPath
from megatron_cpt.law.terms import LawShape, term_names, terms

_HORIZON = 4.0  # the law is also fitted on the first 1/_HORIZON of the runs, to see how it errs beyond its points


@dataclass(frozen=True)
class _RunTerms:
    """A run with its terms at the validated steps, by shape."""

    run: FinishedRun
    path: RunPath
    areas: Floats
    terms: dict[LawShape, Floats]

    def points(self, held_out: str, area: float | None = None) -> FitPoints | None:
        """Return the points of a held-out source, up to a forward area; None if there are none."""
        changes = np.log(self.run.losses[held_out] / self.run.start[held_out])
        chosen = np.isfinite(changes)
        if area is not None:
            chosen &= self.areas <= area
        if not chosen.any():
            return None
        return FitPoints({shape: columns[chosen] for shape, columns in self.terms.items()}, changes[chosen])


def fit_runs(runs: Sequence[FinishedRun]) -> RunLaw:
    """Fit one law per held-out source that every run measured.

    Raises:
        UserError: the runs share no held-out source, or have fewer points than the law has numbers to find.
    """
    sources = tuple(dict.fromkeys(name for run in runs for name in run.path.sources))
    held_out = [name for name in runs[0].losses if all(name in run.losses for run in runs)]
    if not held_out:
        raise UserError("the runs share no held-out source; give them the same `validation.sources`")
    paths = [run.path.with_sources(sources) for run in runs]
    ends = [path.knots_at(run.steps.tolist())[-1] for run, path in zip(runs, paths, strict=True)]
    area = max(float(path.areas[end]) for path, end in zip(paths, ends, strict=True))
    rate = max(float(path.rates[0]) for path in paths) or max(float(path.rates.max()) for path in paths)
    whole = _with_terms(runs, paths, area, rate)
    begun = _with_terms(runs, paths, area / _HORIZON, rate)
    laws = tuple(_fit_held_out(name, whole, begun, area, len(term_names(sources))) for name in held_out)
    return RunLaw(
        runs=tuple(run.folder for run in runs),
        trunks=tuple(dict.fromkeys(str((run.config.get("init") or {}).get("from")) for run in runs)),
        compared=compared_values(runs[0].config),
        sources=sources,
        held_out=laws,
        fitted=_fitted_range(paths, ends),
        notes=tuple(f"{run.folder}: {note}" for run in runs for note in run.notes),
    )


def _with_terms(runs: Sequence[FinishedRun], paths: Sequence[RunPath], area: float, rate: float) -> list[_RunTerms]:
    found = []
    for run, path in zip(runs, paths, strict=True):
        knots = path.knots_at(run.steps.tolist())
        columns = {shape: terms(path, shape)[knots] for shape in LawShape.grid(area, rate)}
        found.append(_RunTerms(run, path, path.areas[knots], columns))
    return found


def _fit_held_out(
    name: str, whole: Sequence[_RunTerms], begun: Sequence[_RunTerms], area: float, num_terms: int
) -> HeldOutLaw:
    points = [found for run in whole if (found := run.points(name)) is not None]
    num_points = sum(len(run.changes) for run in points)
    if len(points) < 3 or num_points < 2 * num_terms:
        raise UserError(
            f"held-out source {name}: {num_points} points of {len(points)} runs, but the law has {num_terms} "
            f"coefficients and needs {2 * num_terms} points of at least 3 runs; lower validation.every or add runs"
        )
    without = [fit_curve([*points[:index], *points[index + 1 :]]) for index in range(len(points))]
    errors = [_end_error(fit, left_out) for fit, left_out in zip(without, points, strict=True)]
    return HeldOutLaw(
        name=name,
        starts=_starts(name, [run.run for run in whole]),
        fit=fit_curve(points),
        without=tuple(without),
        error=float(np.sqrt(np.mean(np.square(errors)))),
        error_per_doubling=_horizon_error(name, begun, area / _HORIZON, num_terms),
        num_points=num_points,
    )


def _starts(name: str, runs: Sequence[FinishedRun]) -> dict[int, float]:
    """Return the loss before the first step per seed, because the seed decides which samples are validated."""
    return {int(run.config.get("seed", 0)): run.start[name] for run in reversed(runs)}


def _end_error(fit: CurveFit, run: FitPoints) -> float:
    return float(run.terms[fit.shape][-1] @ fit.coefficients - run.changes[-1])


def _horizon_error(name: str, begun: Sequence[_RunTerms], area: float, num_terms: int) -> float | None:
    """Return the error per doubling of the area beyond the points of a fit; None if the beginnings have too few points.

    The law is fitted on the first part of every run and predicts the ends of the longer ones.
    """
    first = [found for run in begun if (found := run.points(name, area)) is not None]
    if sum(len(run.changes) for run in first) < num_terms + 2 or len(first) < 3:
        return None
    fit = fit_curve(first)
    errors = [
        _end_error(fit, found) / np.log2(run.areas[-1] / area)
        for run in begun
        if run.areas[-1] > 1.5 * area and (found := run.points(name)) is not None
    ]
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else None


def _fitted_range(paths: Sequence[RunPath], ends: Sequence[Any]) -> FittedRange:
    shares = np.concatenate([path.shares[:end] for path, end in zip(paths, ends, strict=True)])
    names = paths[0].sources
    return FittedRange(
        tokens=max(float(path.tokens[end]) for path, end in zip(paths, ends, strict=True)),
        area=max(float(path.areas[end]) for path, end in zip(paths, ends, strict=True)),
        highest_rate=max(float(path.rates.max()) for path in paths),
        first_rates=(min(float(path.rates[0]) for path in paths), max(float(path.rates[0]) for path in paths)),
        shares={name: (float(shares[:, i].min()), float(shares[:, i].max())) for i, name in enumerate(names)},
    )
