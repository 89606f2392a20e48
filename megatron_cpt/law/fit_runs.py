"""Fit of the law on finished runs, with the errors that omitting runs and cutting them short shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.errors import UserError
from megatron_cpt.law.curve_fit import CurveFit, FitPoints, fit_curve
from megatron_cpt.law.finished_runs import MIN_RUNS, FinishedRun, as_plain, compared_values
from megatron_cpt.law.fitted_law import FittedRange, HeldOutLaw, RunLaw
from megatron_cpt.law.run_path import Floats, RunPath
from megatron_cpt.law.terms import LawShape, term_names, term_signs, terms

_FAR = 1.5  # areas beyond the fitted one from which on a run counts for the error per doubling
_HORIZON = 4.0  # the law is also fitted on the first 1/_HORIZON of the runs, to see how it errs beyond its points


@dataclass(frozen=True)
class _GridTerms:
    """All runs with their terms at the validated steps, for the shapes of one grid.

    Attributes:
        area: forward area that the grid is in units of.
        areas: forward area at the validated steps, by run.
        terms: shape (shapes, points, terms), by run.
    """

    area: float
    shapes: tuple[LawShape, ...]
    signs: Floats
    runs: Sequence[FinishedRun]
    areas: Sequence[Floats]
    terms: Sequence[Floats]

    @classmethod
    def build(cls, runs: Sequence[FinishedRun], paths: Sequence[RunPath], area: float, rate: float) -> _GridTerms:
        """Compute the terms of runs on a grid in units of `area` and `rate`."""
        shapes = tuple(LawShape.grid(area, rate))
        knots = [path.knots_at(run.steps.tolist()) for run, path in zip(runs, paths, strict=True)]
        areas = [path.areas[at] for path, at in zip(paths, knots, strict=True)]
        columns = [
            np.array([terms(path, shape)[at] for shape in shapes]) for path, at in zip(paths, knots, strict=True)
        ]
        return cls(area, shapes, term_signs(paths[0].sources), runs, areas, columns)

    def points(self, held_out: str, *, only_first: bool = False) -> list[FitPoints | None]:
        """Return the points of each run; None for a run without any.

        Args:
            only_first: skip the points beyond `area`.
        """
        found: list[FitPoints | None] = []
        for run, areas, columns in zip(self.runs, self.areas, self.terms, strict=True):
            changes = np.log(run.losses[held_out] / run.start[held_out])
            chosen = np.isfinite(changes) & ((areas <= self.area) if only_first else True)
            found.append(FitPoints(columns[:, chosen], changes[chosen]) if chosen.any() else None)
        return found

    def fit(self, runs: Sequence[FitPoints]) -> CurveFit:
        """Fit points of this grid."""
        return fit_curve(runs, self.shapes, self.signs)

    def end_error(self, fit: CurveFit, run: FitPoints) -> float:
        """Return the relative error of a fit at the last point of a run."""
        return float(run.terms[self.shapes.index(fit.shape), -1] @ fit.coefficients - run.changes[-1])


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
    whole = _GridTerms.build(runs, paths, area, rate)
    begun = _GridTerms.build(runs, paths, area / _HORIZON, rate)
    laws = tuple(_fit_held_out(name, whole, begun, len(term_names(sources))) for name in held_out)
    return RunLaw(
        runs=tuple(run.folder for run in runs),
        trunks=tuple(dict.fromkeys(str(as_plain(run.config, "init.from")) for run in runs)),
        compared=compared_values(runs[0].config),
        sources=sources,
        held_out=laws,
        fitted=_fitted_range(paths, ends),
        notes=tuple(f"{run.folder}: {note}" for run in runs for note in run.notes),
    )


def _fit_held_out(name: str, whole: _GridTerms, begun: _GridTerms, num_terms: int) -> HeldOutLaw:
    points = [found for found in whole.points(name) if found is not None]
    num_points = sum(len(run.changes) for run in points)
    if len(points) < MIN_RUNS or num_points < 2 * num_terms:
        raise UserError(
            f"held-out source {name}: {num_points} points of {len(points)} runs, but the law has {num_terms} "
            f"coefficients: it needs {2 * num_terms} points of {MIN_RUNS} runs; lower validation.every or add runs"
        )
    without = [whole.fit([*points[:index], *points[index + 1 :]]) for index in range(len(points))]
    reach = [
        areas[-1] / whole.area for areas, run in zip(whole.areas, whole.points(name), strict=True) if run is not None
    ]
    errors = [
        whole.end_error(fit, omitted) / np.sqrt(share)
        for fit, omitted, share in zip(without, points, reach, strict=True)
    ]
    return HeldOutLaw(
        name=name,
        start=float(np.median([run.start[name] for run in whole.runs])),
        fit=whole.fit(points),
        without=tuple(without),
        error=float(np.sqrt(np.mean(np.square(errors)))),
        error_per_doubling=_horizon_error(name, begun, num_terms),
        num_points=num_points,
    )


def _horizon_error(name: str, begun: _GridTerms, num_terms: int) -> float | None:
    """Return the error per doubling of the area beyond the points of a fit; None if the beginnings have too few points.

    The law is fitted on the first part of every run and predicts the ends of the longer ones. The largest error counts:
    runs in which the loss hardly changes say nothing about the others.
    """
    first = [found for found in begun.points(name, only_first=True) if found is not None]
    if sum(len(run.changes) for run in first) < num_terms + 2 or len(first) < MIN_RUNS - 1:
        return None
    fit = begun.fit(first)
    errors = [
        abs(begun.end_error(fit, found)) / float(np.log2(areas[-1] / begun.area))
        for found, areas in zip(begun.points(name), begun.areas, strict=True)
        if found is not None and areas[-1] > _FAR * begun.area
    ]
    return max(errors, default=None)


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
