"""Weights of an average: equal, given, and from the shape of a decay."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.errors import UserError
from megatron_cpt.transform.average.average_weights import DECAYS, decay_weights, given_weights, uniform_weights


def test_equal_weights_are_what_fp32_holds() -> None:
    assert uniform_weights(4) == [0.25] * 4
    assert uniform_weights(3) == [float(np.float32(1 / 3))] * 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.25, 0.25, 0.25, 0.25]),
        ("minus-sqrt", [0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5]),
        # 1 - (1 + cos 45) / 2, ... by the half-angle formula
        ("cosine", [0.5 - 0.125**0.5, 0.125**0.5, 0.125**0.5, 0.5 - 0.125**0.5]),
    ],
)
def test_weights_of_each_shape(shape: str, expected: list[float]) -> None:
    assert decay_weights(shape, [100, 200, 300, 400]) == pytest.approx(expected, rel=1e-6)


@given(
    st.sampled_from(sorted(DECAYS)),
    st.lists(st.integers(1, 10**6), min_size=2, max_size=12, unique=True).map(sorted),
)
def test_the_average_has_the_updates_of_the_decayed_rate(shape: str, steps: list[int]) -> None:
    """The weights of the checkpoints that have update i sum to its factor: theorem of arXiv 2507.17634."""
    weights = decay_weights(shape, steps)
    assert all(weight > 0 for weight in weights)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-6)
    mean_interval = (steps[-1] - steps[0]) / (len(steps) - 1)
    end = steps[-1] + mean_interval
    for number in range(1, len(steps)):
        t = (steps[number] - steps[0]) / (end - steps[0])
        factor = {"linear": 1 - t, "cosine": math.cos(math.pi * t / 2) ** 2, "minus-sqrt": 1 - t**0.5}[shape]
        assert math.fsum(weights[number:]) == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize("steps", [[200, 100], [100, 100], [100, 300, 200]])
def test_a_decay_needs_the_oldest_checkpoint_first(steps: list[int]) -> None:
    with pytest.raises(UserError, match=r"do not increase; name the checkpoints oldest first"):
        decay_weights("linear", steps)


def test_an_unknown_decay_is_an_error() -> None:
    with pytest.raises(UserError, match="--decay sqrt: choose linear, cosine, minus-sqrt"):
        decay_weights("sqrt", [1, 2])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], "2 for 3 checkpoints"),
        ([1.5, -0.25, -0.25], "-0.25, -0.25: not above 0"),
        ([0.5, 0.5, 0.0], "0: not above 0"),
        ([0.5, 0.5, 1e-50], "1e-50: not above 0 in fp32"),
        ([0.5, 0.5, math.nan], "nan: not above 0"),
        ([0.5, 0.5, math.inf], "inf: not above 0"),
        ([2.0, 1.0, 1.0], r"sum to 4, not 1.* they are 0\.5 0\.25 0\.25"),
        ([0.33, 0.33, 0.33], r"sum to 0\.99, not 1"),
    ],
)
def test_wrong_weights_are_errors(weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        given_weights(weights, 3)


def test_weights_of_six_digits_are_accepted() -> None:
    assert given_weights([0.333333, 0.333333, 0.333333], 3) == [float(np.float32(0.333333))] * 3
