"""Samples, tokens and epochs that a run reads of each source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_cpt.config import SourceConfig, format_count
from megatron_cpt.planning.problem import Problem
from megatron_cpt.planning.timeline.schedule import SCHEDULE_KEYS
from megatron_cpt.sampling.spans import SpanGrid

REPEAT_LIMIT = 4.0
"""Epochs up to which repeated tokens are almost as useful as new ones (Muennighoff et al., arXiv 2305.16264)."""

_MAX_LISTED = 12


@dataclass(frozen=True)
class SourceUse:
    """Reading of one source in one phase.

    Attributes:
        weight: share of the samples of the phase; shares sum to 1.
        samples: sequences of the phase's seq_length tokens.
        epochs: samples divided by the samples of that length per epoch; None if the size is unknown.
    """

    weight: float
    samples: int
    tokens: int
    epochs: float | None


@dataclass(frozen=True)
class SourceTotal:
    """Reading of one source in the whole run.

    Attributes:
        size: tokens of the source; None if unknown.
        samples: sequences read over all phases, of any length.
        epochs: over all phases, including tokens skipped when the sequence length changes; None if the size is unknown.
        limit: spans after which the source ends and others share its weight; None if it does not end.
        span_length: tokens per span, the longest sequence in which it is read.
        spans_per_epoch: spans per epoch; None if the size is unknown.
    """

    size: int | None
    samples: int
    tokens: int
    epochs: float | None
    max_epochs: float | None
    limit: int | None
    span_length: int
    spans_per_epoch: int | None


def normalize(blend: Mapping[str, float]) -> dict[str, float]:
    """Return weights as shares that sum to 1."""
    # Scale only if the sum would overflow: weights that sum to 1 stay identical bit for bit.
    scale = 1e-300 if max(blend.values(), default=0.0) > 1e300 else 1.0
    total = math.fsum(weight * scale for weight in blend.values())
    return {name: weight * scale / total for name, weight in blend.items()}


def split_samples(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """Divide samples by weight; each source gets weight x samples up to one, and the sum is exactly `samples`.

    Rounds up the largest remainders, ties in order: 10 samples at 0.55, 0.25, 0.2 give 6, 2, 2. The blend
    (`sampling/blend.py`) chooses sample by sample; its counts differ by about one.

    Args:
        weights: shares that sum to 1.
        samples: samples to divide.
    """
    if not weights:
        return {}
    exact = {name: weight * samples for name, weight in weights.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    # sorted() is stable: equal remainders stay in the order of the blend.
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    missing = samples - sum(counts.values())
    # With huge counts rounding can be off by more samples than there are sources, in both directions.
    for turn in range(abs(missing)):
        counts[by_remainder[turn % len(by_remainder)]] += 1 if missing > 0 else -1
    return counts


def divide_samples(
    weights: Mapping[str, float], samples: int, room: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Divide samples by weight among sources that may end; the others then share the weight.

    Example: 100 samples at 0.5, 0.5 with 20 left in the first give 20 and 80; the first ends after 40 samples.

    Args:
        weights: shares that sum to 1.
        samples: samples to divide.
        room: samples left in each source; a source without an entry never ends.

    Returns:
        Samples of each source, whose sum is below `samples` if all sources end; and for each source that ends, the
        number of samples divided before.
    """
    counts, ended = dict.fromkeys(weights, 0), dict[str, int]()
    active, done = dict(weights), 0
    while done < samples:
        left = {name: room[name] - counts[name] for name in active if name in room}
        over = [name for name, rest in left.items() if rest <= 0]
        if over:
            ended |= dict.fromkeys(over, done)
            active = normalize({name: weight for name, weight in active.items() if name not in over})
        if not active:
            break
        until_next = min((math.ceil(left[name] / active[name]) for name in left if name in active), default=samples)
        for name, count in split_samples(active, min(until_next, samples - done)).items():
            given = min(count, left.get(name, count))  # the next round divides samples beyond the end
            counts[name] += given
            done += given
    return counts, ended


def span_limits(sources: Mapping[str, SourceConfig], grids: Mapping[str, SpanGrid]) -> dict[str, int]:
    """Return the number of spans after which a source ends, for `on_exhausted: renormalize` and known sizes."""
    return {
        name: math.floor(source.max_epochs * grids[name].num_spans + 1e-6)  # 1.1 epochs of 10 are 11 spans
        for name, source in sources.items()
        if source.on_exhausted == "renormalize" and source.max_epochs is not None and name in grids
    }


def samples_in_epoch(tokens: int, seq_length: int) -> int:
    """Return the sequences per epoch. Each needs one more token to predict, so 4,097 tokens hold one of 4,096."""
    return max(0, tokens - 1) // seq_length


def size_problems(source_tokens: Mapping[str, int], grids: Mapping[str, SpanGrid]) -> Iterator[Problem]:
    """Yield sources that are shorter than one span."""
    for name, tokens in source_tokens.items():
        if grids[name].num_spans < 1:
            length = grids[name].seq_length
            text = f"sources.{name}: {tokens:,} tokens are too few for one sample of seq_length + 1 = {length + 1}"
            keys = (f"sources.{name}", "seq_length", "phases[*].seq_length")
            yield Problem(f"{text}; add data, shorten seq_length or remove the source", keys)


def epoch_problems(totals: Mapping[str, SourceTotal], uses: Mapping[str, Mapping[str, SourceUse]]) -> Iterator[Problem]:
    """Yield sources that the run reads more often than `max_epochs`; `uses` has readings by phase, then by source."""
    for name, total in totals.items():
        limit = total.max_epochs
        if limit is None or total.epochs is None or total.epochs <= limit * (1 + 1e-9):
            continue
        phase = _phase_that_exceeds(name, limit, uses)
        text = (
            f"sources.{name}.max_epochs: {limit:g}: the run reads {format_count(total.tokens)} of its "
            f"{format_count(total.size or 0)} tokens = {total.epochs:.2f} epochs (the limit falls in phase {phase}); "
        )
        text += (
            f"lower its weight by a factor of {total.epochs / limit:.3g}, raise max_epochs, add data or shorten the run"
        )
        yield Problem(text, (f"sources.{name}", "phases", *SCHEDULE_KEYS))


def _phase_that_exceeds(name: str, limit: float, uses: Mapping[str, Mapping[str, SourceUse]]) -> str:
    epochs = accumulate((sources[name].epochs or 0.0) if name in sources else 0.0 for sources in uses.values())
    return next((phase for phase, read in zip(uses, epochs, strict=True) if read > limit), list(uses)[-1])


def source_warnings(totals: Mapping[str, SourceTotal]) -> Iterator[str]:
    """Yield warnings about sources that are never read, or read very often."""
    unread = [name for name, total in totals.items() if total.samples == 0]
    if unread:
        yield f"in no blend and therefore never read: {listed(unread)}"
    repeated = [f"{name} ({t.epochs:.2f} times)" for name, t in totals.items() if t.epochs and t.epochs > REPEAT_LIMIT]
    if repeated:
        yield (
            f"read more than {REPEAT_LIMIT:g} times: {listed(repeated)}; repeated tokens then lose their "
            "value (arXiv 2305.16264)"
        )


def listed(names: Sequence[str]) -> str:
    """Return names as one line, shortened to the first 12."""
    shown = ", ".join(names[:_MAX_LISTED])
    return shown if len(names) <= _MAX_LISTED else f"{shown} and {len(names) - _MAX_LISTED} more"
