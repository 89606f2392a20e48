"""Fit of the law on finished runs, with the errors that omitting arms and cutting runs short shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.config import format_number_of
from megatron_cpt.errors import UserError
from megatron_cpt.law.curve_fit import CurveFit, FitPoints, fit_curve
from megatron_cpt.law.finished_runs import (
    MIN_ARMS,
    FinishedRun,
    arms_of,
    as_plain,
    compared_values,
    data_paths,
)
from megatron_cpt.law.fitted_law import FittedRange, HeldOutLaw, RunLaw
from megatron_cpt.law.run_path import Floats, RunPath
from megatron_cpt.law.terms import LawShape, term_names, term_signs, terms

_FAR = 1.5  # areas beyond the fitted one from which on a run counts for the error per doubling
_HORIZON = 4.0  # the law is also fitted on the first 1/_HORIZON of the runs, to see how it errs beyond its points
_SAME_BLENDS = (
    0.01  # singular values of the shares below this part of the largest count as 0: about one percentage point
)


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
    arms = arms_of(runs)
    laws = tuple(_fit_held_out(name, whole, begun, arms, len(term_names(sources))) for name in held_out)
    firsts = [arm[0] for arm in arms]
    return RunLaw(
        arms=tuple(tuple(runs[index].folder for index in arm) for arm in arms),
        num_seeds=len({repr(run.config.get("seed")) for run in runs}),
        trunks=tuple(dict.fromkeys(str(as_plain(run.config, "init.from")) for run in runs)),
        compared=compared_values(runs[0].config),
        data=_fitted_data(runs, held_out),
        sources=sources,
        held_out=laws,
        fitted=_fitted_range(paths, ends),
        notes=tuple(f"{run.folder}: {note}" for run in runs for note in run.notes),
        warnings=tuple(_blend_warnings([paths[index] for index in firsts], [ends[index] for index in firsts])),
    )


def _fitted_data(runs: Sequence[FinishedRun], held_out: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return the paths of the sources, each from a run that reads it."""
    found: dict[str, dict[str, list[str]]] = {"sources": {}, "validation.sources": {}}
    for run in runs:
        for key, used in (("sources", run.path.sources), ("validation.sources", held_out)):
            paths = data_paths(run.config)[key]
            found[key] = {name: paths[name] for name in used if name in paths} | found[key]
    return found


def _fit_held_out(
    name: str, whole: _GridTerms, begun: _GridTerms, arms: Sequence[Sequence[int]], num_terms: int
) -> HeldOutLaw:
    found = whole.points(name)
    num_points = sum(len(points.changes) for points in found if points is not None)
    num_arms = _num_arms(arms, found)
    if num_arms < MIN_ARMS or num_points < 2 * num_terms:
        raise UserError(
            f"held-out source {name}: {num_points} points of {format_number_of(num_arms, 'arm')}, but the law has "
            f"{num_terms} coefficients: it needs {2 * num_terms} points of {MIN_ARMS} arms; lower validation.every or "
            "add runs"
        )
    without: list[CurveFit] = []
    squares: list[float] = []
    for arm in arms:
        # All seeds of an arm are omitted: with a twin in the fit, only the noise between seeds would show.
        fit = whole.fit([points for index, points in enumerate(found) if points is not None and index not in arm])
        without.append(fit)
        omitted = [
            whole.end_error(fit, points) ** 2 / (whole.areas[index][-1] / whole.area)
            for index in arm
            if (points := found[index]) is not None
        ]
        if omitted:
            squares.append(float(np.mean(omitted)))
    return HeldOutLaw(
        name=name,
        start=float(np.median([run.start[name] for run in whole.runs])),
        fit=whole.fit([points for points in found if points is not None]),
        without=tuple(without),
        error=float(np.sqrt(np.mean(squares))),
        error_per_doubling=_horizon_error(name, begun, arms, num_terms),
        num_points=num_points,
    )


def _num_arms(arms: Sequence[Sequence[int]], found: Sequence[FitPoints | None]) -> int:
    """Return the number of arms with any point."""
    return sum(any(found[index] is not None for index in arm) for arm in arms)


def _horizon_error(name: str, begun: _GridTerms, arms: Sequence[Sequence[int]], num_terms: int) -> float | None:
    """Return the error per doubling of the area beyond the points of a fit; None if the beginnings have too few points.

    The law is fitted on the first part of every run and predicts the ends of the longer ones. The largest error counts:
    runs in which the loss hardly changes say nothing about the others.
    """
    begun_points = begun.points(name, only_first=True)
    first = [points for points in begun_points if points is not None]
    if sum(len(points.changes) for points in first) < num_terms + 2 or _num_arms(arms, begun_points) < MIN_ARMS - 1:
        return None
    fit = begun.fit(first)
    errors = [
        abs(begun.end_error(fit, found)) / float(np.log2(areas[-1] / begun.area))
        for found, areas in zip(begun.points(name), begun.areas, strict=True)
        if found is not None and areas[-1] > _FAR * begun.area
    ]
    return max(errors, default=None)


def _blend_warnings(paths: Sequence[RunPath], ends: Sequence[Any]) -> Iterator[str]:
    """Yield a warning if the shares of the arms do not vary in as many directions as there are sources.

    Example: the arms {web: 0.7, code: 0.3} and {web: 0.63, code: 0.27, qa: 0.1}, with any switch between these blends,
    give two directions of three: web and code always move together.
    """
    tokens = [
        np.average(path.shares[:end], axis=0, weights=np.diff(path.tokens[: end + 1]))
        for path, end in zip(paths, ends, strict=True)
    ]
    values = np.linalg.svd(np.array(tokens), compute_uv=False)
    rank = int(np.count_nonzero(values > _SAME_BLENDS * values[0]))
    sources = paths[0].sources
    if rank < len(sources):
        yield (
            f"the fitted runs have {format_number_of(rank, 'independent blend')} of {len(sources)} sources "
            f"({', '.join(sources)}): their shares cannot be told apart, so blends and switches are not predicted "
            "reliably; add runs that vary the share of one source at a time"
        )


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
