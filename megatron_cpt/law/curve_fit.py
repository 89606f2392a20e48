"""Fit of one held-out source: shape by search over a fixed grid, coefficients by robust ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cpt.law.run_path import Floats
from megatron_cpt.law.terms import LawShape

_RIDGE = 1e-6  # per point, on standardized terms: decides only what the points leave open
_HUBER = 1.345  # residuals beyond this many standard deviations count linearly: 95 % efficiency on normal noise
_ROUNDS = 5
_MAD = 0.6745  # median absolute deviation of the standard normal distribution


@dataclass(frozen=True)
class FitPoints:
    """Points of one run and one held-out source.

    Attributes:
        terms: terms at the points for each shape of the grid, shape (shapes, points, terms).
        changes: logarithm of held-out loss / loss before the first step, shape (points,).
    """

    terms: Floats
    changes: Floats


@dataclass(frozen=True)
class CurveFit:
    """Law of one held-out source: log(loss / loss before the first step) is `terms(path, shape) @ coefficients`."""

    shape: LawShape
    coefficients: Floats


def fit_curve(runs: Sequence[FitPoints], shapes: Sequence[LawShape], signs: Floats) -> CurveFit:
    """Return the shape and coefficients with the smallest Huber cost; ties: the first shape.

    Beyond `_HUBER` standard deviations of the best least-squares fit, a residual counts linearly. The bound is the same
    for all shapes, so their costs can be compared.

    Args:
        signs: sign that each coefficient must have, shape (terms,); 0: any.
    """
    columns = np.concatenate([run.terms for run in runs], axis=1)
    changes = np.concatenate([run.changes for run in runs])
    scales = np.sqrt((columns**2).mean(axis=1, keepdims=True))
    scales[scales == 0] = 1.0
    scaled = columns / scales
    weights = np.ones((len(shapes), len(changes)))
    solutions, residuals = _solve(scaled, changes, weights, signs)
    bound = _HUBER * max(float(np.median(np.abs(residuals), axis=1).min()) / _MAD, 1e-9)
    for _ in range(_ROUNDS):
        weights = np.minimum(1.0, bound / np.maximum(np.abs(residuals), 1e-300))
        solutions, residuals = _solve(scaled, changes, weights, signs)
    small = np.minimum(np.abs(residuals), bound)
    costs = (small * (np.abs(residuals) - 0.5 * small)).mean(axis=1) + 0.5 * _RIDGE * (solutions**2).sum(axis=1)
    best = int(costs.argmin())
    return CurveFit(shapes[best], solutions[best] / scales[best, 0])


def _solve(scaled: Floats, changes: Floats, weights: Floats, signs: Floats) -> tuple[Floats, Floats]:
    """Return ridge solutions, shape (shapes, terms), and residuals, shape (shapes, points), for all shapes at once.

    Coefficients with the wrong sign become 0, one round after the other, until none is left.
    """
    weighted = np.swapaxes(scaled * weights[:, :, None], 1, 2)
    products, right = weighted @ scaled, weighted @ changes[:, None]
    identity = np.eye(len(signs))
    is_free = np.ones((len(products), len(signs)), dtype=bool)
    while True:
        # A term that is not free has a row and a column of the identity, and 0 on the right.
        both = is_free[:, :, None] & is_free[:, None, :]
        matrix = np.where(both, products + _RIDGE * len(changes) * identity, identity)
        solutions: Floats = np.linalg.solve(matrix, np.where(is_free[:, :, None], right, 0.0))[:, :, 0]
        is_wrong = is_free & (signs * solutions < 0)
        if not is_wrong.any():
            return solutions, changes - (scaled @ solutions[:, :, None])[:, :, 0]
        is_free &= ~is_wrong
