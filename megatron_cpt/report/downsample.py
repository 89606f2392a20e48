"""Fewer points of a long series, with every spike still in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Columns = dict[str, npt.NDArray[np.float64]]


def downsample(
    steps: Sequence[int], columns: Mapping[str, Sequence[float]], num_buckets: int
) -> tuple[npt.NDArray[np.int64], Columns]:
    """Keep the lowest and the highest value of each bucket of steps, in the order in which they occurred.

    Buckets are equally wide in steps and start at the first one, so the result depends on the data only. Example: steps
    1 to 8 with losses 5, 9, 4, 4, 3, 3, 1, 2 and two buckets become steps 1, 4, 5, 8 with losses 9, 4, 3, 1.

    Args:
        steps: rising.
        columns: values by name, one per step; NaN: no value.
        num_buckets: a series of at most twice as many points is returned unchanged.

    Returns:
        Steps, the first and the last one of each bucket, and the columns; NaN where a bucket has no value.
    """
    at = np.array(steps, dtype=np.int64)
    values = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    if len(at) <= 2 * num_buckets:
        return at, values
    width = -(-(int(at[-1]) - int(at[0]) + 1) // num_buckets)
    starts = np.flatnonzero(np.diff((at - at[0]) // width, prepend=-1))
    ends = np.append(starts[1:], len(at)) - 1
    pairs = np.stack([at[starts], at[ends]], axis=1).ravel()
    kept = np.append(True, np.diff(pairs) > 0)  # a bucket of one line gives one point
    return pairs[kept], {name: _extremes(column, starts, ends).ravel()[kept] for name, column in values.items()}


def _extremes(
    column: npt.NDArray[np.float64], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the two extremes of each bucket, (num_buckets, 2), in the order of their first occurrence."""
    lowest, highest = np.fmin.reduceat(column, starts), np.fmax.reduceat(column, starts)
    counts, places = ends - starts + 1, np.arange(len(column))
    first_low, first_high = (
        np.minimum.reduceat(np.where(column == np.repeat(extreme, counts), places, len(column)), starts)
        for extreme in (lowest, highest)
    )
    pairs = np.stack([lowest, highest], axis=1)
    return np.where((first_low <= first_high)[:, None], pairs, pairs[:, ::-1])
