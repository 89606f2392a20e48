"""Path of a run: learning rate, tokens and share of each source over its steps, taken from its plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.planning import Schedule

Floats = npt.NDArray[np.float64]

_INTERVALS = 160
_MOST_RATES = 32  # rates per interval that are computed; the area of a longer interval is their mean times its tokens


@dataclass(frozen=True)
class RunPath:
    """A run at K + 1 knots between its steps; knot 0 is before the first step.

    Attributes:
        steps: steps done at each knot, shape (K + 1,).
        tokens: tokens trained on at each knot.
        rates: learning rate of the last step before each knot; at knot 0 of the first step.
        areas: sum of learning rate x tokens over the steps before each knot (the forward area).
        shares: share of each source in each interval, shape (K, sources).
        sources: names of the sources, in the order of `shares`.
    """

    steps: npt.NDArray[np.int64]
    tokens: Floats
    rates: Floats
    areas: Floats
    shares: Floats
    sources: tuple[str, ...]

    def knots_at(self, steps: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the knots of steps; each must be one."""
        knots = np.searchsorted(self.steps, steps)
        assert np.array_equal(self.steps[knots], steps), "a step is no knot of the path"
        return knots

    def equals(self, other: RunPath) -> bool:
        """Return whether both paths have equal knots, rates and shares; the order of their sources may differ."""
        if not np.array_equal(self.steps, other.steps):
            return False
        names = sorted({*self.sources, *other.sources})
        own, others = self.with_sources(names).shares, other.with_sources(names).shares
        return (
            np.array_equal(self.tokens, other.tokens)
            and np.allclose(self.rates, other.rates, rtol=1e-9, atol=0)
            and np.allclose(own, others, rtol=0, atol=1e-9)
        )

    def with_sources(self, names: Sequence[str]) -> RunPath:
        """Return the path with its shares in the order of `names`; a source that it does not read has share 0."""
        shares = np.zeros((len(self.shares), len(names)))
        for column, name in enumerate(names):
            if name in self.sources:
                shares[:, column] = self.shares[:, self.sources.index(name)]
        return RunPath(self.steps, self.tokens, self.rates, self.areas, shares, tuple(names))


def path_of_plan(plan: Mapping[str, Any], *, at: Iterable[int] = ()) -> RunPath:
    """Return the path of a plan.

    Args:
        plan: content of plan.json, or `RunPlan.to_dict()`.
        at: steps that become knots, besides the ends of phases and sources and an even grid.

    Raises:
        KeyError, TypeError, ValueError: the plan is damaged.
    """
    schedule = Schedule(**plan["schedule"])
    last = int(plan["steps"])
    blends = list(_blends(plan))
    names = tuple(dict.fromkeys(name for _, weights in blends for name in weights))
    ends = {end for end, _ in blends} | {stretch["last_step"] for stretch in _stretches(plan)}
    grid = np.linspace(0, last, min(_INTERVALS, last) + 1).round().astype(np.int64)
    steps = np.unique([*grid, *(end for end in ends if end <= last), *(step for step in at if 0 <= step <= last)])
    tokens = np.array([_tokens_after(plan, int(step)) for step in steps], dtype=np.float64)
    rates = np.array([schedule.rate(max(1, int(step))) for step in steps])
    means = [
        schedule.rates(np.unique(np.linspace(first + 1, end, _MOST_RATES).round().astype(np.int64))).mean()
        for first, end in pairwise(steps.tolist())
    ]
    areas = np.concatenate([[0.0], np.cumsum(np.array(means) * np.diff(tokens))])
    shares = np.zeros((len(steps) - 1, len(names)))
    for index, end in enumerate(steps[1:]):
        weights = next(weights for last_step, weights in blends if end <= last_step)
        shares[index] = [weights.get(name, 0.0) for name in names]
    return RunPath(steps, tokens, rates, areas, shares, names)


def _blends(plan: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the last step and the share per source of each stretch of equal shares.

    A source that ends inside a phase leaves its share to the others.
    """
    for phase in plan["phases"]:
        weights = {name: float(use["weight"]) for name, use in phase["sources"].items()}
        ended = sorted((step, name) for name, step in phase.get("ends", {}).items() if step < phase["last_step"])
        for step, name in ended:
            yield int(step), _normalized(weights)
            weights.pop(name)
        yield int(phase["last_step"]), _normalized(weights)


def _normalized(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _stretches(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [stretch for phase in plan["phases"] for stretch in phase["stretches"]]


def _tokens_after(plan: Mapping[str, Any], step: int) -> float:
    if step == 0:
        return 0.0
    stretch = next(stretch for stretch in _stretches(plan) if step <= stretch["last_step"])
    done = step - stretch["first_step"] + 1
    return float(stretch["first_token"] + done * stretch["global_batch"] * stretch["seq_length"])
