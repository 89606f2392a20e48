"""Student's t distribution without scipy: tail probability and quantile.

P(|T| > t) with v degrees of freedom is the regularized incomplete beta function I_x(v / 2, 1 / 2) at
x = v / (v + t^2) (NIST Digital Library of Mathematical Functions, dlmf.nist.gov, 8.17; Abramowitz and Stegun 26.5.27).
"""

from __future__ import annotations

import math

_PRECISION = 1e-15
_TINY = 1e-300
_MAX_TERMS = 10_000


def two_sided_p(t: float, degrees: int) -> float:
    """Return the probability that |T| exceeds |t|.

    Example:
        >>> round(two_sided_p(4.303, 2), 4)
        0.05
    """
    if math.isinf(t):
        return 0.0
    squared = t * t
    return _incomplete_beta(degrees / (degrees + squared), squared / (degrees + squared), degrees / 2, 0.5)


def quantile(confidence: float, degrees: int) -> float:
    """Return the t for which |T| stays below t with a probability of `confidence`; bisection, since p falls with t.

    Example:
        >>> round(quantile(0.95, 2), 3)
        4.303
    """
    low, high = 0.0, 1.0
    while two_sided_p(high, degrees) > 1 - confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if two_sided_p(middle, degrees) > 1 - confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """Return I_x(a, b); `rest` is 1 - x, computed without the rounding of a difference."""
    if x <= 0.0 or rest <= 0.0:
        return 0.0 if x <= 0.0 else 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest))
    if x < (a + 1) / (a + b + 2):
        return front * _continued_fraction(x, a, b) / a
    return 1.0 - front * _continued_fraction(rest, b, a) / b


def _continued_fraction(x: float, a: float, b: float) -> float:
    """Return the continued fraction of DLMF 8.17.22 by Lentz's method; it converges fast for x < (a+1) / (a+b+2)."""
    c, d = 1.0, _not_zero(1.0 - (a + b) * x / (a + 1))
    value = d = 1.0 / d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d = 1.0 / _not_zero(1.0 + term * d)
            c = _not_zero(1.0 + term / c)
            change = c * d
            value *= change
        if abs(change - 1.0) < _PRECISION:
            break
    return value


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
