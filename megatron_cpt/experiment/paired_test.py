"""Paired comparison of two arms by seed, and Holm's correction for several comparisons.

Both arms of a pair start from the same weights and read their data in the order of the same seed, so their difference
varies less than each value. With differences d_1 ... d_n, mean m and sample standard deviation s, the interval is
m +- t(n - 1) s / sqrt(n), and the test statistic is m sqrt(n) / s with n - 1 degrees of freedom (NIST/SEMATECH
e-Handbook of Statistical Methods, 7.3.1.1). Holm (1979, Scandinavian Journal of Statistics 6, 65-70): the i-th of the
sorted p-values p_(1) <= ... <= p_(k) becomes the largest min(1, (k - j + 1) p_(j)) of all j <= i. This bounds the
probability of any false claim by 1 - confidence, however the comparisons depend on each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cpt.law.student_t import quantile, two_sided_p

_ROUNDING = 1e-12  # differences below this share of the values are rounding, not noise between seeds


@dataclass(frozen=True)
class PairedDifference:
    """Difference of an arm from another one over the seeds that both have.

    Attributes:
        num_seeds: number of seeds.
        mean: mean difference; NaN without any common seed.
        half_width: of the confidence interval; None with fewer than two seeds.
        p: of the two-sided paired t-test; None with fewer than two seeds.
    """

    num_seeds: int
    mean: float
    half_width: float | None
    p: float | None


def compare_pairs(values: Sequence[float], others: Sequence[float], confidence: float) -> PairedDifference:
    """Compare values with others by seed; entries at the same place belong to the same seed.

    Equal values in every pair give a difference of 0 with p = 1.

    Args:
        confidence: level of the interval, such as 0.95.
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    count = len(differences)
    if not count:
        return PairedDifference(0, math.nan, None, None)
    mean = statistics.fmean(differences)
    if count == 1:
        return PairedDifference(1, mean, None, None)
    error = statistics.stdev(differences) / math.sqrt(count)
    if max(map(abs, differences)) <= _ROUNDING * max(map(abs, [*values, *others])):
        return PairedDifference(count, mean, 0.0, 1.0)
    p = two_sided_p(mean / error, count - 1) if error else 0.0
    return PairedDifference(count, mean, quantile(confidence, count - 1) * error, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's corrected p-values in the order given; None, an unknown one, counts as no comparison.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return corrected
