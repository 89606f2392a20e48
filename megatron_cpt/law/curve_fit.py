"""Fit of one held-out source: shape by search over a fixed grid, coefficients by robust ridge regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cpt.law.run_path import Floats
from megatron_cpt.law.terms import LawShape

_RIDGE = 1e-4  # per point, on standardized terms: decides only what the points leave open
_HUBER = 1.345  # residuals beyond this many standard deviations count linearly: 95 % efficiency on normal noise
_ROUNDS = 5
_MAD = 0.6745  # median absolute deviation of the standard normal distribution


@dataclass(frozen=True)
class FitPoints:
    """Points of one run and one held-out source.

    Attributes:
        terms: terms at the points by shape, each of shape (points, terms).
        changes: logarithm of held-out loss / loss before the first step, shape (points,).
    """

    terms: Mapping[LawShape, Floats]
    changes: Floats


@dataclass(frozen=True)
class CurveFit:
    """Law of one held-out source: log(loss / loss before the first step) is `terms(path, shape) @ coefficients`."""

    shape: LawShape
    coefficients: Floats
    cost: float


def fit_curve(runs: Sequence[FitPoints]) -> CurveFit:
    """Return the shape and coefficients with the smallest Huber cost; ties: the first shape.

    Beyond `_HUBER` standard deviations of the best least-squares fit, a residual counts linearly. The bound is the same
    for all shapes, so their costs can be compared.
    """
    changes = np.concatenate([run.changes for run in runs])
    columns = {shape: np.concatenate([run.terms[shape] for run in runs]) for shape in runs[0].terms}
    least = [_fit_shape(columns[shape], changes, shape, bound=np.inf, rounds=1)[1] for shape in columns]
    spread = min(float(np.median(np.abs(residuals))) for residuals in least) / _MAD
    bound = _HUBER * max(spread, 1e-9)
    fits = [_fit_shape(columns[shape], changes, shape, bound=bound, rounds=_ROUNDS)[0] for shape in columns]
    return min(fits, key=lambda fit: fit.cost)


def _fit_shape(
    columns: Floats, changes: Floats, shape: LawShape, *, bound: float, rounds: int
) -> tuple[CurveFit, Floats]:
    """Return the fit for a shape and its residuals, by iteratively reweighted least squares with Huber's weights."""
    scales = np.sqrt((columns**2).mean(axis=0))
    scales[scales == 0] = 1.0
    scaled = columns / scales
    penalty = _RIDGE * len(changes) * np.eye(columns.shape[1])
    weights = np.ones(len(changes))
    for _ in range(rounds):
        weighted = scaled * weights[:, None]
        solution = np.linalg.solve(weighted.T @ scaled + penalty, weighted.T @ changes)
        residuals = changes - scaled @ solution
        weights = np.minimum(1.0, bound / np.maximum(np.abs(residuals), 1e-300))
    small = np.minimum(np.abs(residuals), bound)
    huber = small * (np.abs(residuals) - 0.5 * small) if np.isfinite(bound) else 0.5 * residuals**2
    cost = float(huber.mean() + 0.5 * _RIDGE * (solution**2).sum())
    return CurveFit(shape, solution / scales, cost), residuals
