"""Downsampling keeps every spike, and the same points every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.report.downsample import downsample


def test_the_lowest_and_highest_value_of_each_bucket_stay_in_their_order():
    steps, columns = downsample(range(1, 9), {"loss": [5, 9, 4, 4, 3, 3, 1, 2]}, 2)
    assert steps.tolist() == [1, 4, 5, 8]
    assert columns["loss"].tolist() == [9, 4, 3, 1]


def test_a_short_series_is_unchanged():
    steps, columns = downsample([3, 7, 9], {"loss": [1.0, float("nan"), 2.0]}, 2)
    assert steps.tolist() == [3, 7, 9]
    assert columns["loss"].tolist() == pytest.approx([1.0, float("nan"), 2.0], nan_ok=True)


def test_a_spike_and_a_gap_stay_visible():
    values = np.ones(10_000)
    values[7_777] = 50.0
    values[2_000:4_000] = np.nan
    steps, columns = downsample(range(10_000), {"loss": values}, 100)
    assert len(steps) <= 200
    assert np.nanmax(columns["loss"]) == 50.0
    assert abs(int(steps[np.nanargmax(columns["loss"])]) - 7_777) < 100
    assert np.isnan(columns["loss"][(steps > 2_100) & (steps < 3_900)]).all()


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(-1e6, 1e6) | st.just(float("nan"))), min_size=1, max_size=300),
    st.integers(1, 20),
)
def test_extremes_are_those_of_the_series_and_steps_rise(pairs, num_buckets):
    steps = np.cumsum([gap for gap, _ in pairs])
    values = [value for _, value in pairs]
    kept, columns = downsample(steps.tolist(), {"v": values}, num_buckets)
    assert len(kept) <= max(2 * num_buckets, 1)
    assert (np.diff(kept) > 0).all()
    known = [value for value in values if value == value]
    found = columns["v"][~np.isnan(columns["v"])]
    if len(kept) == len(steps):
        return
    assert set(found) <= set(known)
    assert (not known) or len(found)
