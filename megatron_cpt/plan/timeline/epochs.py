"""How much of each source a run reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_cpt.config import SourceConfig, format_count
from megatron_cpt.plan.problem import Problem
from megatron_cpt.plan.timeline.schedule import SCHEDULE_KEYS
from megatron_cpt.sampling.spans import SpanGrid

REPEAT_LIMIT = 4.0
"""Epochs up to which repeated tokens are worth almost as much as new ones (Muennighoff et al., arXiv 2305.16264)."""

_MOST_LISTED = 12


@dataclass(frozen=True)
class SourceUse:
    """What one phase reads of one source.

    Attributes:
        weight: its share of the phase's samples; the shares of a phase sum to 1.
        samples: sequences of the phase's seq_length tokens.
        tokens: samples x seq_length.
        epochs: samples / samples of that length in one epoch; None where the size of the source is not known.
    """

    weight: float
    samples: int
    tokens: int
    epochs: float | None


@dataclass(frozen=True)
class SourceTotal:
    """What the whole run reads of one source.

    Attributes:
        size: its tokens; None where that is not known.
        samples: sequences read over all phases, of whatever length.
        tokens: in all of them.
        epochs: over all phases, with what a change of length passes over; None where the size is not known.
        max_epochs: the limit of run.yaml, if there is one.
        limit: spans after which it ends and the others share its weight; None: it does not.
        span_length: tokens in its spans, the longest samples it is read in.
        spans_per_epoch: spans in one pass over it; None where the size is not known.
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
    """Weights as shares that sum to 1."""
    # Scaled only where the sum would overflow: weights that sum to 1 stay what they are, to the bit.
    scale = 1e-300 if max(blend.values(), default=0.0) > 1e300 else 1.0
    total = math.fsum(weight * scale for weight in blend.values())
    return {name: weight * scale / total for name, weight in blend.items()}


def split_samples(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """Share samples out by weight, each source within one of weight x samples, summing to `samples` exactly.

    Largest remainders first, ties to the source named first. The blend itself deals samples out one by one to whoever
    is furthest behind; its counts differ from these by about one sample.

    Args:
        weights: shares that sum to 1.
        samples: what there is to share out.
    """
    if not weights:
        return {}
    exact = {name: weight * samples for name, weight in weights.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    # sorted() is stable: equal remainders stay in the order of the blend.
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    missing = samples - sum(counts.values())
    # Rounding of huge counts can leave a few samples more than sources, or too many dealt out: go round.
    for turn in range(abs(missing)):
        counts[by_remainder[turn % len(by_remainder)]] += 1 if missing > 0 else -1
    return counts


def share_out(
    weights: Mapping[str, float], samples: int, room: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Share samples out where sources may end: from there on the others share the weight of one that has ended.

    Args:
        weights: shares that sum to 1.
        samples: what there is to share out.
        room: samples that a source can still give; one that is left out never ends.

    Returns:
        Samples of each source, together fewer than asked for where all have ended; and by source that has ended, after
        how many samples.
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
            given = min(count, left.get(name, count))  # what rounding gave beyond the end is shared out once more
            counts[name] += given
            done += given
    return counts, ended


def span_limits(sources: Mapping[str, SourceConfig], grids: Mapping[str, SpanGrid]) -> dict[str, int]:
    """Spans after which a source ends, for those that do and whose size is known."""
    return {
        name: math.floor(source.max_epochs * grids[name].num_spans + 1e-6)  # 1.1 epochs of 10 are 11 spans
        for name, source in sources.items()
        if source.on_exhausted == "renormalize" and source.max_epochs is not None and name in grids
    }


def samples_in_epoch(tokens: int, seq_length: int) -> int:
    """Sequences in one pass over a source: each needs one token more to predict, so the last token starts none."""
    return max(0, tokens - 1) // seq_length


def size_problems(source_tokens: Mapping[str, int], grids: Mapping[str, SpanGrid]) -> Iterator[Problem]:
    """Sources too small for a single span."""
    for name, tokens in source_tokens.items():
        if grids[name].num_spans < 1:
            length = grids[name].seq_length
            text = f"sources.{name}: {tokens:,} tokens are too few for one sample of seq_length + 1 = {length + 1}"
            keys = (f"sources.{name}", "seq_length", "phases[*].seq_length")
            yield Problem(f"{text}; add data, shorten seq_length or leave it out", keys)


def epoch_problems(totals: Mapping[str, SourceTotal], uses: Mapping[str, Mapping[str, SourceUse]]) -> Iterator[Problem]:
    """Sources that the run reads more often than their max_epochs.

    Args:
        totals: by source, over the whole run.
        uses: by phase in order, then by source.
    """
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
    epochs = 0.0
    for phase, sources in uses.items():
        epochs += (sources[name].epochs or 0.0) if name in sources else 0.0
        if epochs > limit:
            return phase
    return list(uses)[-1]


def source_warnings(totals: Mapping[str, SourceTotal]) -> Iterator[str]:
    """What a plan may do, but should not do unnoticed."""
    unread = [name for name, total in totals.items() if total.samples == 0]
    if unread:
        yield f"in no phase's blend, so nothing of it is read: {listed(unread)}"
    worn = [f"{name} ({t.epochs:.2f} times)" for name, t in totals.items() if t.epochs and t.epochs > REPEAT_LIMIT]
    if worn:
        yield (
            f"read more than {REPEAT_LIMIT:g} times: {listed(worn)}; beyond that repeated tokens are worth less and "
            "less (arXiv 2305.16264)"
        )


def listed(names: Sequence[str]) -> str:
    """Names in a line; of very many the first."""
    shown = ", ".join(names[:_MOST_LISTED])
    return shown if len(names) <= _MOST_LISTED else f"{shown} and {len(names) - _MOST_LISTED} more"
