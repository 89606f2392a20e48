"""Weights of the two phases: general sources by tokens and quality, QA data at a tenth, nothing above four epochs.

Let G and Q be the samples of the two phases, and q the share of QA data in the second (0.1). A general source of weight
w gives w G + w (1 - q) Q samples, a QA source of weight v in the QA phase v Q samples. A weight that would exceed four
epochs is cut to the limit, and the other sources of its kind share the rest in proportion. If all QA sources are cut, q
falls below 0.1 and the general sources get the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_cpt.errors import UserError
from megatron_cpt.planning.timeline.epochs import REPEAT_LIMIT, normalize

QA_SHARE = 0.1
_DIGITS = 4  # significant digits of a weight
_SPARE_SAMPLES = 2  # the planner rounds the samples of a source up, at most once per phase


class TooLongRunError(UserError):
    """Run that would read the general sources more than four times."""


@dataclass(frozen=True)
class SizedSource:
    """Source with what decides its weight.

    Attributes:
        tokens: size in tokens.
        samples: sequences per epoch.
        factor: multiplier of its tokens: quality, or weakness of the model in its area.
    """

    tokens: int
    samples: int
    factor: float = 1.0


@dataclass(frozen=True)
class BlendWeights:
    """Weights of both phases.

    Attributes:
        general: weight per source in phase `general`; they sum to 1.
        qa_phase: weight per source in phase `qa`, QA sources last; they sum to 1.
        qa_share: share of QA data in phase `qa`.
        wanted: weight per source before cuts: general sources in phase `general`, QA sources in phase `qa`.
        cut: names of the sources whose weight was cut to stay within four epochs.
        epochs: epochs per source over the run.
    """

    general: Mapping[str, float]
    qa_phase: Mapping[str, float]
    qa_share: float
    wanted: Mapping[str, float]
    cut: frozenset[str]
    epochs: Mapping[str, float] = field(default_factory=dict)


def weigh_sources(
    general: Mapping[str, SizedSource], qa: Mapping[str, SizedSource], *, general_samples: int, qa_samples: int
) -> BlendWeights:
    """Return the weights of both phases.

    Args:
        general_samples, qa_samples: samples of phase `general` and of phase `qa`.

    Raises:
        TooLongRunError: four epochs of all general sources are fewer samples than the run reads.
    """
    most_qa = {name: _most_samples(source) / qa_samples for name, source in qa.items()}
    qa_share = min(QA_SHARE, _floor(math.fsum(most_qa.values())))
    wanted_qa = {name: QA_SHARE * weight for name, weight in normalize(_products(qa)).items()}
    shares_qa = share_out(wanted_qa, most_qa, qa_share)
    weights_qa = _rounded(shares_qa, most_qa, qa_share)

    general_reads = general_samples + (1.0 - qa_share) * qa_samples
    most = {name: _most_samples(source) / general_reads for name, source in general.items()}
    if (available := math.fsum(most.values())) < 1.0:
        raise TooLongRunError(
            f"--tokens: four epochs of the general sources are {available:.1%} of what the run reads of them; more "
            "epochs teach little (arXiv 2305.16264)"
        )
    wanted = normalize(_products(general))
    shares = share_out(wanted, most, 1.0)
    weights = _rounded(shares, most, 1.0)
    in_qa_phase = {name: weight * (1.0 - qa_share) for name, weight in weights.items()}
    most_in_qa_phase = {name: limit * (1.0 - qa_share) for name, limit in most.items()}
    in_qa_phase = _rounded(in_qa_phase, most_in_qa_phase, 1.0 - qa_share)
    read = {name: weights[name] * general_samples + in_qa_phase[name] * qa_samples for name in general}
    read |= {name: weight * qa_samples for name, weight in weights_qa.items()}
    all_wanted, given = {**wanted, **wanted_qa}, {**shares, **shares_qa}
    return BlendWeights(
        general=weights,
        qa_phase={**in_qa_phase, **weights_qa},
        qa_share=qa_share,
        wanted=all_wanted,
        cut=frozenset(name for name, weight in given.items() if weight < all_wanted[name] * (1 - 1e-9)),
        epochs={name: read[name] / source.samples for name, source in {**general, **qa}.items()},
    )


def share_out(wanted: Mapping[str, float], most: Mapping[str, float], total: float) -> dict[str, float]:
    """Divide `total` in proportion to the wanted weights, with none above its largest value.

    Example:
        >>> share_out({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.4, "b": 1, "c": 1}, 1.0)
        {'a': 0.4, 'b': 0.36, 'c': 0.24}
    """
    given: dict[str, float] = {}
    while len(given) < len(wanted):
        rest = total - math.fsum(given.values())
        active = {name: weight for name, weight in wanted.items() if name not in given}
        scaled = {name: rest * share for name, share in normalize(active).items()}
        over = {name: most[name] for name, weight in scaled.items() if weight > most[name]}
        if not over:
            given |= scaled
        given |= over
    return {name: given[name] for name in wanted}


def _products(sources: Mapping[str, SizedSource]) -> dict[str, float]:
    return {name: source.tokens * source.factor for name, source in sources.items()}


def _most_samples(source: SizedSource) -> float:
    return max(1.0, REPEAT_LIMIT * source.samples - _SPARE_SAMPLES)


def _rounded(weights: Mapping[str, float], most: Mapping[str, float], total: float) -> dict[str, float]:
    """Round weights down to four digits; the sources farthest from their limits get the remainder, none beyond it."""
    rounded = {name: _floor(weight) for name, weight in weights.items()}
    for name in sorted(rounded, key=lambda name: rounded[name] - most[name]):
        remainder = total - math.fsum(rounded.values())
        given = min(remainder, most[name] - rounded[name])
        if given > 1e-12:
            rounded[name] = round(rounded[name] + given, 12)
    return rounded


def _floor(weight: float) -> float:
    """Round down to four significant digits: 0.123456 becomes 0.1234."""
    if weight <= 0:
        return 0.0
    digits = _DIGITS - 1 - math.floor(math.log10(weight))
    scale = 10.0**digits
    return round(math.floor(weight * scale * (1 + 1e-12)) / scale, digits)
