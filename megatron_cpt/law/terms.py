"""Terms of the law along a run: what its learning rate and its blend have done up to each knot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_cpt.law.run_path import Floats, RunPath

_ANNEALING = (4.0, 16.0, 64.0)
_SHIFT = (8.0, 32.0, 128.0)  # slower ones are not told from learning in runs of one area
_LEARNING = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_EXPONENT = (0.5, 1.0)


@dataclass(frozen=True)
class LawShape:
    """The nonlinear numbers of the law, in units of `area`, so that the same grid fits every size of run.

    Attributes:
        area: forward area of the longest fitted run, in learning rate x tokens.
        rate: highest learning rate of the first steps of the fitted runs.
        annealing: how often per `area` the noise of the learning rate relaxes to the present rate.
        shift: how often per `area` the model adapts to the present blend.
        learning: area of a source, in `area`, after which what it teaches slows down.
        exponent: power of a source's share that counts: below 1 a small share counts for more than its part.
    """

    area: float
    rate: float
    annealing: float
    shift: float
    learning: float
    exponent: float

    @classmethod
    def grid(cls, area: float, rate: float) -> Iterator[LawShape]:
        """Yield the shapes among which a fit chooses, in a fixed order."""
        for numbers in itertools.product(_ANNEALING, _SHIFT, _LEARNING, _EXPONENT):
            yield cls(area, rate, *numbers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def term_names(sources: Sequence[str]) -> list[str]:
    """Return the names of the columns of `terms`."""
    return ["annealing", *(f"shift {name}" for name in sources), *(f"learning {name}" for name in sources)]


def term_signs(sources: Sequence[str]) -> Floats:
    """Return the sign that each coefficient must have; 0: any.

    A falling learning rate never raises a loss, and neither does learning from more tokens. Forgetting is a shift. With
    free signs, a slope of noise in short runs would grow with the logarithm of the tokens.
    """
    count = len(sources)
    return np.array([1.0, *(0.0,) * count, *(-1.0,) * count])


def terms(path: RunPath, shape: LawShape) -> Floats:
    """Return the terms at every knot of a path, shape (K + 1, 1 + 2 x sources); all are 0 before the first step.

    - annealing: (noise - first rate) / first rate, where the noise follows the learning rate with a delay
    - shift of a source: its share, averaged over the recent past
    - learning of a source: log(1 + area of the source / `learning`)
    """
    spent = np.diff(path.areas) / shape.area
    counted = path.shares**shape.exponent
    columns = np.empty((len(path.steps), 1 + 2 * len(path.sources)))
    middle = 0.5 * (path.rates[:-1] + path.rates[1:]) / shape.rate - 1.0
    columns[:, :1] = _relaxed(middle[:, None], spent * shape.annealing)
    columns[:, 1 : 1 + len(path.sources)] = _relaxed(counted, spent * shape.shift)
    learned = np.concatenate([np.zeros((1, counted.shape[1])), np.cumsum(counted * spent[:, None], axis=0)])
    columns[:, 1 + len(path.sources) :] = np.log1p(learned / shape.learning)
    return columns


def _relaxed(targets: Floats, progress: Floats) -> Floats:
    """Return the state at each knot of x' = target - x, from x = 0; `progress` is the time of each interval."""
    kept = np.exp(-progress)[:, None]
    states = np.zeros((len(targets) + 1, targets.shape[1]))
    for index, target in enumerate(targets):
        states[index + 1] = target + (states[index] - target) * kept[index]
    return states
