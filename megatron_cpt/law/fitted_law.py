"""A fitted law: losses along a path with their interval, and what of a path lies outside the fitted runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from megatron_cpt.config import format_count
from megatron_cpt.errors import UserError
from megatron_cpt.law.curve_fit import CurveFit
from megatron_cpt.law.run_path import Floats, RunPath
from megatron_cpt.law.student_t import quantile
from megatron_cpt.law.terms import terms

CONFIDENCE = 0.9
"""Share of the runs whose loss an interval should contain."""

_SHARE_MARGIN = 0.02  # a share this far outside the fitted ones is still inside


@dataclass(frozen=True)
class FittedRange:
    """Range of the fitted runs.

    Attributes:
        tokens: of the longest run.
        area: forward area of the longest run, in learning rate x tokens.
        highest_rate: highest learning rate of any run.
        first_rates: lowest and highest learning rate of a first step.
        shares: smallest and largest share of each training source, over all steps.
    """

    tokens: float
    area: float
    highest_rate: float
    first_rates: tuple[float, float]
    shares: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class LossForecast:
    """Expected held-out loss at the knots of a path.

    Attributes:
        start: loss before the first step.
        change: logarithm of loss / start, shape (K + 1,).
        width: half the width of the interval of `change`.
        without: `change` by the fits that omit one arm each, shape (arms, K + 1).
    """

    start: float
    change: Floats
    width: Floats
    without: Floats

    @property
    def loss(self) -> Floats:
        """Expected loss, shape (K + 1,)."""
        return self.start * np.exp(self.change)

    @property
    def low(self) -> Floats:
        """Lower bound of the interval of the loss."""
        return self.start * np.exp(self.change - self.width)

    @property
    def high(self) -> Floats:
        """Upper bound of the interval of the loss."""
        return self.start * np.exp(self.change + self.width)


@dataclass(frozen=True)
class HeldOutLaw:
    """Law of one held-out source.

    Attributes:
        start: loss before the first step, the median over the fitted runs.
        fit: on all runs.
        without: fits that omit all runs of one arm each, in the order of the arms.
        error: root mean square, over the arms, of the relative errors at the end of the omitted runs, scaled to the
            longest run: they grow with the root of the area.
        error_per_doubling: largest error of a run beyond the fitted area, per doubling of it; None: the runs are too
            short to measure it.
        num_points: points of the fit.
    """

    name: str
    start: float
    fit: CurveFit
    without: tuple[CurveFit, ...]
    error: float
    error_per_doubling: float | None
    num_points: int

    def width(self, without: Floats, areas: Floats, fitted_area: float) -> Floats:
        """Return half the width of the interval.

        Three independent errors add up: of the coefficients (jackknife over the arms), of a single run inside the
        fitted range, and of the form of the law beyond it. No run errs before its first step, so the second one grows
        with the area up to the longest fitted run.

        Args:
            without: predictions of the fits that omit one arm each, shape (arms, knots).
            areas: forward area at each knot.
        """
        reach = areas / fitted_area
        own = self.error * np.sqrt(np.clip(reach, 0.0, 1.0))
        beyond = (self.error_per_doubling or self.error) * np.log2(np.maximum(reach, 1.0))
        return quantile(CONFIDENCE, len(without) - 1) * np.sqrt(jackknife_variance(without) + own**2 + beyond**2)


@dataclass(frozen=True)
class RunLaw:
    """Laws of all held-out sources, fitted on the same runs.

    Attributes:
        arms: run directories of the fit by arm; runs of one arm differ only in seed, name or output.
        num_seeds: number of different seeds of the runs.
        trunks: `init.from` of the runs, each once.
        compared: values of run.yaml that the law holds for, by dotted key.
        data: paths of the fitted data by source: training sources under `sources`, held-out ones under
            `validation.sources`.
        sources: training sources, in the order of the terms.
        notes: points and lines that were skipped.
        warnings: reasons to doubt every prediction.
    """

    arms: tuple[tuple[str, ...], ...]
    num_seeds: int
    trunks: tuple[str, ...]
    compared: Mapping[str, Any]
    data: Mapping[str, Mapping[str, Sequence[str]]]
    sources: tuple[str, ...]
    held_out: tuple[HeldOutLaw, ...]
    fitted: FittedRange
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def check_sources(self, path: RunPath) -> None:
        """Refuse a path that reads a source which no fitted run has read.

        Raises:
            UserError: names the sources.
        """
        unknown = [name for name in path.sources if name not in self.sources]
        if unknown:
            raise UserError(
                f"--predict: no fitted run reads {', '.join(unknown)}, so what its tokens do is unknown; the law knows "
                f"{', '.join(self.sources)}. Run a small run with it and fit again"
            )

    def forecast(self, path: RunPath) -> dict[str, LossForecast]:
        """Return the expected loss of each held-out source along a path.

        Raises:
            UserError: the path reads a source which no fitted run has read.
        """
        self.check_sources(path)
        columns = cache(partial(terms, path.with_sources(self.sources)))  # many fits share a shape
        found = {}
        for law in self.held_out:
            without = np.array([columns(fit.shape) @ fit.coefficients for fit in law.without])
            width = law.width(without, path.areas, self.fitted.area)
            change = columns(law.fit.shape) @ law.fit.coefficients
            found[law.name] = LossForecast(law.start, change, width, without)
        return found

    def outside(self, path: RunPath) -> Iterator[str]:
        """Yield a sentence for each way in which a path leaves the range of the fitted runs."""
        fitted = self.fitted
        if path.areas[-1] > 1.01 * fitted.area or path.tokens[-1] > 1.01 * fitted.tokens:
            yield (
                f"{format_count(int(path.tokens[-1]))} tokens, the longest fitted run has "
                f"{format_count(int(fitted.tokens))}; the sum of learning rate x tokens is "
                f"{path.areas[-1] / fitted.area:.1f} times the largest fitted one"
            )
        low, high = fitted.first_rates
        if not 0.99 * low <= path.rates[0] <= 1.01 * high:
            yield f"the first step has rate {path.rates[0]:.3g}, the fitted runs {_between(low, high, '.3g')}"
        if path.rates.max() > 1.01 * fitted.highest_rate:
            yield f"the highest rate is {path.rates.max():.3g}, of the fitted runs {fitted.highest_rate:.3g}"
        shares = path.with_sources(self.sources).shares
        for index, name in enumerate(self.sources):
            low, high = fitted.shares[name]
            least, most = float(shares[:, index].min()), float(shares[:, index].max())
            if least < low - _SHARE_MARGIN or most > high + _SHARE_MARGIN:
                here, there = _between(least, most, ".2f"), _between(low, high, ".2f")
                yield f"{name} has a share of {here}, in the fitted runs {there}"


def _between(low: float, high: float, form: str) -> str:
    return f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"


def jackknife_variance(without: Floats) -> Floats:
    """Return the variance of predictions by omitting one arm each, shape (arms, ...) -> (...)."""
    count = len(without)
    variance: Floats = (count - 1) / count * ((without - without.mean(axis=0)) ** 2).sum(axis=0)
    return variance
