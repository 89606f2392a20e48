"""Weights of an average: uniform, given, or derived from the shape of a learning-rate decay.

WSM (arXiv 2507.17634) merges checkpoints of a run at a constant learning rate in place of a decay. Let checkpoint j be
checkpoint 0 minus the updates g_1 to g_j between neighbors. The average with weights c_0 to c_k is checkpoint 0 minus
the sum of (c_i + ... + c_k) * g_i. So it has the updates of a decayed rate, with factor f_i for update i, if

    c_k = f_k,    c_j = f_j - f_(j+1) for 0 < j < k,    c_0 = 1 - f_1

The paper leaves the factors open. Here f_i = shape(t_i), where t_i is the position of checkpoint i in the decay. It is
0 at checkpoint 0, and 1 one mean interval after checkpoint k, where the next checkpoint would be. With checkpoints at
equal distances t_i = i / (k + 1), and `linear` is the plain mean.

Example: 4 checkpoints at equal distances, minus-sqrt: t = 0, 1/4, 1/2, 3/4; f = 1, 0.5, 0.293, 0.134;
c = 0.5, 0.207, 0.159, 0.134.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from megatron_cpt.errors import UserError

DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "minus-sqrt": lambda t: 1 - math.sqrt(t),
}
"""Factor of the learning rate at position t of a decay, from 1 at t = 0 to 0 at t = 1."""

_SMALLEST = float(np.finfo(np.float32).tiny)
_SUM_TOLERANCE = 1e-5  # weights may be typed with six digits


def uniform_weights(count: int) -> list[float]:
    """Return equal weights."""
    return in_fp32([1 / count] * count)


def given_weights(weights: Sequence[float], count: int) -> list[float]:
    """Return weights as a user gave them, rounded to fp32.

    Raises:
        UserError: they are not one finite, positive number per checkpoint, or do not sum to 1.
    """
    if len(weights) != count:
        raise UserError(f"--weights: {len(weights)} for {count} checkpoints; give one per checkpoint, in their order")
    if wrong := [f"{weight:g}" for weight in weights if not _SMALLEST <= weight < math.inf]:
        raise UserError(
            f"--weights: {', '.join(wrong)}: not above 0 in fp32; omit checkpoints that should have no part in the "
            "average"
        )
    total = math.fsum(weights)
    if abs(total - 1) > _SUM_TOLERANCE:
        scaled = " ".join(f"{weight / total:.7g}" for weight in weights)
        raise UserError(
            f"--weights: they sum to {total:.7g}, not 1, so the average would be a scaled model; divided by their sum "
            f"they are {scaled}"
        )
    return in_fp32(weights)


def decay_weights(shape: str, positions: Sequence[float]) -> list[float]:
    """Return the weights that emulate a learning-rate decay over the checkpoints, see the module's docstring.

    Args:
        shape: a key of `DECAYS`.
        positions: steps of the checkpoints, increasing; at least 2.

    Raises:
        UserError: the positions do not increase, or no decay has this name.
    """
    if shape not in DECAYS:
        raise UserError(f"--decay {shape}: choose {', '.join(DECAYS)}")
    if any(later <= earlier for earlier, later in pairwise(positions)):
        steps = ", ".join(f"{position:,}" for position in positions)
        raise UserError(f"--decay {shape}: the steps {steps} do not increase; name the checkpoints oldest first")
    first, last = positions[0], positions[-1]
    length = (last - first) * len(positions) / (len(positions) - 1)
    factors = [DECAYS[shape]((position - first) / length) for position in positions]
    return in_fp32([factor - following for factor, following in pairwise([*factors, 0.0])])


def in_fp32(weights: Sequence[float]) -> list[float]:
    """Return weights rounded to the fp32 numbers that tensors are multiplied by."""
    return [float(np.float32(weight)) for weight in weights]
