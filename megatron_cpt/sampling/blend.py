"""The blend: which source each sample of the run comes from. Nothing but counting.

Inside a phase, sample i goes to the source that is furthest behind its share; that is the rule of megatron-core's
`build_blending_indices` (`datasets/helpers.cpp`), computed as it goes instead of being indexed for the whole run. No
source is ever a whole sample ahead of its share, nor more than 1 + 1/2 + ... + 1/(n - 1) behind it
(docs/decisions.md). Its state is one counter a source, so a run can be extended, its blend changed from now on and its
world size changed, and every source still goes on exactly where it stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.sampling.spans import SpanGrid

_NO_LIMIT = np.iinfo(np.int64).max


@dataclass(frozen=True)
class PhaseBlend:
    """A segment of the run with one blend.

    Attributes:
        name: the phase's name, unique in the run.
        first_sample: its first sample, counted over the whole run from 0.
        num_samples: its length in samples.
        weights: share of each source, summing to 1; a source that is not in the phase is left out.
        seq_length: tokens in its samples; None: each source's own.
    """

    name: str
    first_sample: int
    num_samples: int
    weights: Mapping[str, float]
    seq_length: int | None = None

    @property
    def end_sample(self) -> int:
        """The first sample after the phase."""
        return self.first_sample + self.num_samples


def assign(weights: npt.NDArray[np.float64], given: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int32]:
    """Hands out the next `count` samples of a phase.

    Sample i (the first is number given.sum()) goes to the source with the largest weight * max(i, 1) - given; of
    several, to the first.

    Args:
        weights: float64 (num_sources,), summing to 1.
        given: int64 (num_sources,), samples each source has had in this phase; updated in place.
        count: how many samples to hand out.

    Returns:
        int32 (count,): the source of each sample.
    """
    first = int(given.sum())
    behind = np.empty(len(weights), np.float64)
    had = given.astype(np.float64)  # exact below 2^53, and it saves a conversion a sample
    chosen = np.empty(count, np.int32)
    for i in range(count):
        # Product, then difference, each rounded to float64: what the C++ does, so ties fall the same way.
        np.multiply(weights, float(max(first + i, 1)), out=behind)
        np.subtract(behind, had, out=behind)
        source = behind.argmax()
        chosen[i] = source
        had[source] += 1.0
    given += np.bincount(chosen, minlength=len(given))
    return chosen


class BlendCursor:
    """Walks the samples of the whole run, phase after phase, and counts what each source has given.

    A source that has given its limit has ended: from that sample on the others of the blend share its weight in
    proportion to theirs, as a new blend that counts from there. Which sources have ended follows from the counters, so
    they remain all of the state.

    Where phases differ in sequence length, the number of a sample in its source counts samples of that length, and a
    source whose length changes goes on with its next unread window (`SpanGrid.turn`). What it needs for that is two
    numbers more a source: the length it was read in last, and what to add to its counter for the next number. All of it
    holds for spans of one length only, so that is part of the state as well, also of a source that has left the run.

    Args:
        phases: in order, without gaps, the first one from sample 0.
        source_names: every source of the run; the order decides ties.
        limits: spans (samples of the source's own length) after which a source ends, counted over the whole run; one
            that is left out never does.
        grids: the spans of each source; needed where phases say how long their samples are.
    """

    def __init__(
        self,
        phases: Sequence[PhaseBlend],
        source_names: Sequence[str],
        *,
        limits: Mapping[str, int] | None = None,
        grids: Mapping[str, SpanGrid] | None = None,
    ) -> None:
        self.phases = tuple(phases)
        self.source_names = tuple(source_names)
        _check_phases(self.phases, self.source_names)
        self._span_limits = dict(limits or {})
        self._grids = dict(grids or {})
        read = {name for phase in self.phases for name in phase.weights}
        self._span_lengths = {name: grid.seq_length for name, grid in self._grids.items() if name in read}
        self._absent_span_lengths: dict[str, int] = {}
        self.sample = 0
        self._counts = np.zeros(len(self.source_names), np.int64)
        self._start_with({})
        self._absent: dict[str, int] = {}  # what sources gave that are no longer part of the run
        self._enter(self._phase_at(0))

    @property
    def num_samples(self) -> int:
        """Samples of all phases together."""
        return self.phases[-1].end_sample

    @property
    def remaining(self) -> int:
        """Samples not handed out yet."""
        return self.num_samples - self.sample

    @property
    def seq_length(self) -> int | None:
        """Tokens in the samples that were handed out last; None: each source's own."""
        return self._phase.seq_length

    @property
    def counts(self) -> dict[str, int]:
        """Samples each source has given since the start of the run."""
        return dict(zip(self.source_names, self._counts.tolist(), strict=True)) | self._absent

    def next(self, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The next samples of the run.

        Args:
            count: at most `remaining`.

        Returns:
            two int64 arrays (count,): the source of each sample (a place in `source_names`), and which sample of that
            source it is, counted from 0 over the whole run in samples of the phase's length.

        Raises:
            UserError: all sources of the phase have ended.
        """
        assert 0 <= count <= self.remaining, f"{count} samples asked for, {self.remaining} left"
        sources, ks = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            if self.sample >= self._phase.end_sample or self._has_ended(self._active).any():
                self._enter(self._phase_at(self.sample))
            taken = self._take(min(count - done, self._phase.end_sample - self.sample), ks[done:])
            sources[done : done + len(taken)] = taken
            done += len(taken)
        return sources, ks

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, in plain integers, strings and lists."""
        state = {
            "sample": self.sample,
            "counts": self.counts,
            "phase": self._phase.name,
            "weights": self._weights_in_force(),
            "counts_at_blend_start": dict(zip(self.source_names, self._blend_start.tolist(), strict=True)),
        }
        span_lengths = {name: length for name, length in self._span_lengths.items() if self.counts[name]}
        more = {"lengths": self._lengths_in_force(), "chunk_lengths": span_lengths | self._absent_span_lengths}
        return state | {name: value for name, value in more.items() if value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, under the phases of this cursor.

        A source the state does not know starts at 0; what a source gave that is no longer part of the run is kept. If
        the phase's name and weights are those of the state, its blend goes on to the sample as if never interrupted;
        if not (also because a source's limit was changed), the new blend counts from now on and does not try to make up
        for what was read before.

        Raises:
            RefusedError: the state contradicts itself, or counts spans of another length than the phases want.
        """
        counts = {str(name): int(number) for name, number in state["counts"].items()}
        sample = int(state["sample"])
        if sum(counts.values()) != sample or min(counts.values(), default=0) < 0:
            raise RefusedError(
                f"data state: the sources' counts add up to {sum(counts.values())}, but {sample} samples were read; "
                "load another checkpoint"
            )
        self._check_span_lengths({name: int(length) for name, length in state.get("chunk_lengths", {}).items()})
        self.sample = sample
        self._counts = np.array([counts.pop(name, 0) for name in self.source_names], np.int64)
        self._absent = counts
        self._start_with(state.get("lengths", {}))
        phase = self._phase_at(sample)
        self._enter(phase)
        if phase.name == state["phase"] and self._weights_in_force() == dict(state["weights"]):
            start = state["counts_at_blend_start"]
            self._blend_start = np.array([int(start.get(name, 0)) for name in self.source_names], np.int64)
            if (self._blend_start > self._counts).any():
                raise RefusedError(
                    "data state: a source gave less in all than before its phase; load another checkpoint"
                )

    def _phase_at(self, sample: int) -> PhaseBlend:
        """The phase a sample belongs to; past the end, the last."""
        return next((phase for phase in self.phases if sample < phase.end_sample), self.phases[-1])

    def _enter(self, phase: PhaseBlend) -> None:
        """Begins a blend at the present sample: deficits start at 0, the sources' counters go on."""
        self._phase = phase
        named = np.array([i for i, name in enumerate(self.source_names) if name in phase.weights], np.int64)
        if phase.seq_length is not None:
            self._turn(named.tolist(), phase.seq_length)
        self._active = named[~self._has_ended(named)]
        self._weights = np.array([phase.weights[self.source_names[i]] for i in self._active], np.float64)
        if 0 < len(self._active) < len(named):  # the weights of a whole blend stay what they are, to the bit
            self._weights /= self._weights.sum()
        self._blend_start = self._counts.copy()

    def _check_span_lengths(self, before: Mapping[str, int]) -> None:
        """Refuses spans that are not those which were counted, and keeps the lengths of sources that are not read."""
        now = self._span_lengths
        recut = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
        if recut:
            raise RefusedError(
                "data state: the longest sequences of a source cannot change once it was read: "
                f"{', '.join(recut)} tokens; keep the length, or give the source another name in `sources`, under "
                "which it begins anew"
            )
        self._absent_span_lengths = {name: length for name, length in before.items() if name not in now}

    def _start_with(self, lengths: Mapping[str, Sequence[int]]) -> None:
        """Sets what every source is read in: as a state says, and whatever it leaves out in whole spans from 0."""
        pairs = [lengths.get(name, (self._own_length(name), 0)) for name in self.source_names]
        self._absent_lengths = {name: list(pair) for name, pair in lengths.items() if name not in self._span_lengths}
        self._lengths = [int(length) for length, _ in pairs]
        self._offsets = np.array([offset for _, offset in pairs], np.int64)
        self._limits = np.array([self._limit(i) for i in range(len(pairs))], np.int64)

    def _own_length(self, name: str) -> int:
        return self._grids[name].seq_length if name in self._grids else 0

    def _turn(self, sources: Sequence[int], seq_length: int) -> None:
        """Goes on with samples of this length: each source where nothing was read of a window."""
        for i in sources:
            grid = self._grids.get(self.source_names[i])
            if grid is None or self._lengths[i] == seq_length:
                continue
            k = grid.turn(int(self._counts[i] + self._offsets[i]), self._lengths[i], seq_length)
            self._lengths[i] = seq_length
            self._offsets[i] = k - self._counts[i]
            self._limits[i] = self._limit(i)

    def _limit(self, i: int) -> int:
        """The count at which a source ends, if it is read in its present length until then."""
        name = self.source_names[i]
        limit = self._span_limits.get(name)
        if limit is None:
            return _NO_LIMIT
        parts = self._grids[name].parts(self._lengths[i]) if name in self._grids else 1
        return limit * parts - int(self._offsets[i])

    def _lengths_in_force(self) -> dict[str, list[int]]:
        """By source what its length is and what its counter lacks; not those that were always read in whole spans."""
        pairs = map(list, zip(self._lengths, self._offsets.tolist(), strict=True))
        places = dict(zip(self.source_names, pairs, strict=True))
        cut = {name: place for name, place in places.items() if place != [self._own_length(name), 0]}
        return cut | self._absent_lengths

    def _has_ended(self, sources: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        ended: npt.NDArray[np.bool_] = self._counts[sources] >= self._limits[sources]
        return ended

    def _weights_in_force(self) -> dict[str, float]:
        """The present blend, without the sources that had ended when it began."""
        names = (self.source_names[i] for i in self._active)
        return dict(zip(names, self._weights.tolist(), strict=True))

    def _take(self, count: int, ks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Hands out `count` samples of the present phase, or fewer: up to the last one of a source that ends.

        Writes their numbers in the sources to the front of `ks`.
        """
        if not len(self._active):
            raise UserError(
                f"phase {self._phase.name}: all its sources have ended (they gave their max_epochs) at sample "
                f"{self.sample} of the run; raise max_epochs or give the phase another source"
            )
        given = (self._counts - self._blend_start)[self._active]
        sources = self._active[assign(self._weights, given, count)]
        sources = sources[: self._first_end(sources)]
        count = len(sources)
        # The j-th sample of a source in this call is its number counts + offset + j: rank each among its source's.
        order = np.argsort(sources, kind="stable")
        taken = np.bincount(sources, minlength=len(self._counts))
        ranks = np.arange(count) - np.repeat(np.cumsum(taken) - taken, taken)
        ks[order] = (self._counts + self._offsets)[sources[order]] + ranks
        self._counts += taken
        self.sample += count
        return sources

    def _first_end(self, sources: npt.NDArray[np.int64]) -> int:
        """How many of these samples can be handed out until one of the sources has given its last."""
        room = self._limits[self._active] - self._counts[self._active]
        end = len(sources)
        for source, left in zip(self._active[room < end], room[room < end].tolist(), strict=True):
            places = np.flatnonzero(sources[:end] == source)
            if len(places) >= left:
                end = int(places[left - 1]) + 1
        return end


def _check_phases(phases: tuple[PhaseBlend, ...], source_names: tuple[str, ...]) -> None:
    """Invariants that the planner guarantees."""
    assert phases, "no phases"
    assert len(set(source_names)) == len(source_names), "two sources of one name"
    assert len({phase.name for phase in phases}) == len(phases), "two phases of one name"
    expected = 0
    for phase in phases:
        assert phase.first_sample == expected, f"phase {phase.name} begins at {phase.first_sample}, not at {expected}"
        assert phase.num_samples >= 0, f"phase {phase.name} has {phase.num_samples} samples"
        assert set(phase.weights) <= set(source_names), f"phase {phase.name} names a source that the run does not have"
        assert all(weight > 0 for weight in phase.weights.values()), f"phase {phase.name} has a weight of zero or less"
        assert abs(sum(phase.weights.values()) - 1) < 1e-6, f"the weights of phase {phase.name} do not add up to 1"
        expected = phase.end_sample
