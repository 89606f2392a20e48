"""Counters of a run: how many samples each source has given, and which of its samples comes next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import RefusedError
from megatron_cpt.sampling.spans import SpanGrid

_NO_LIMIT = np.iinfo(np.int64).max


class SourceCounters:
    """Samples that each source has given since the start of the run.

    The next sample of a source has the index count + offset. The offset is 0 until the source's sample length changes;
    from then on it accounts for the other unit and for the part of a window that was skipped.

    Example (the source of `SpanGrid`'s example): 47 samples of 4 tokens were read, so the count is 47 and the offset 0.
    If samples become 16 tokens long, the next one has index 20, and the offset becomes 20 - 47 = -27.

    Sources that are in `state` but no longer in the run keep their entries, in case they return.

    Args:
        names: all sources of the run.
        read_names: sources that are in the blend of at least one phase.
        limits: spans after which a source ends, counted over the whole run; a source without an entry never ends.
        grids: spans of each source; required for sources whose sample length changes.
        state: result of `state_dict`; empty: the start of the run.

    Attributes:
        counts: int64 (num_sources,).

    Raises:
        RefusedError: `state` counts spans of another length than `grids` has.
    """

    def __init__(
        self,
        names: Sequence[str],
        read_names: Collection[str],
        limits: Mapping[str, int],
        grids: Mapping[str, SpanGrid],
        state: Mapping[str, Any],
    ) -> None:
        self._names, self._span_limits, self._grids = names, limits, grids
        counts = {str(name): int(count) for name, count in state.get("counts", {}).items()}
        self.counts = np.array([counts.pop(name, 0) for name in names], np.int64)
        self._removed_counts = counts

        self._span_lengths = {name: grid.seq_length for name, grid in grids.items() if name in read_names}
        span_lengths = {name: int(length) for name, length in state.get("chunk_lengths", {}).items()}
        _check_span_lengths(span_lengths, self._span_lengths)
        self._unread_span_lengths = {n: length for n, length in span_lengths.items() if n not in self._span_lengths}

        lengths = state.get("lengths", {})
        pairs = [lengths.get(name, self._initial_length(name)) for name in names]
        self._unread_lengths = {n: list(pair) for n, pair in lengths.items() if n not in self._span_lengths}
        self._lengths = [int(length) for length, _ in pairs]
        self._offsets = np.array([offset for _, offset in pairs], np.int64)
        self._limits = np.array([self._count_limit(i) for i in range(len(names))], np.int64)

    def to_dict(self) -> dict[str, int]:
        """Return the count per source, including sources that are no longer in the run."""
        return dict(zip(self._names, self.counts.tolist(), strict=True)) | self._removed_counts

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and, for sources that have them, the sample and span lengths; plain JSON values.

        `lengths` has [sample length, offset] per source, omitted while that is [span length, 0]. `chunk_lengths` has
        the span length per source that was read.
        """
        pairs = map(list, zip(self._lengths, self._offsets.tolist(), strict=True))
        changed = {n: pair for n, pair in zip(self._names, pairs, strict=True) if pair != self._initial_length(n)}
        counts = self.to_dict()
        read_lengths = {name: length for name, length in self._span_lengths.items() if counts[name]}
        optional = {
            "lengths": changed | self._unread_lengths,
            "chunk_lengths": read_lengths | self._unread_span_lengths,
        }
        return {"counts": counts} | {key: value for key, value in optional.items() if value}

    def take(self, sources: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count one sample for each entry of `sources`, and return the sample's index in its source."""
        # The j-th occurrence of a source in `sources` (from 0) is its sample count + offset + j.
        order = np.argsort(sources, kind="stable")
        taken = np.bincount(sources, minlength=len(self.counts))
        occurrences = np.arange(len(sources)) - np.repeat(np.cumsum(taken) - taken, taken)
        sample_indices = np.empty(len(sources), np.int64)
        sample_indices[order] = (self.counts + self._offsets)[sources[order]] + occurrences
        self.counts += taken
        return sample_indices

    def remaining(self, sources: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many samples each of these sources can still give before its limit."""
        left: npt.NDArray[np.int64] = self._limits[sources] - self.counts[sources]
        return left

    def set_length(self, sources: Iterable[int], seq_length: int) -> None:
        """Read these sources in samples of `seq_length` tokens from now on, each from its first unread window."""
        for i in sources:
            grid = self._grids.get(self._names[i])
            if grid is None or self._lengths[i] == seq_length:
                continue
            next_index = int(self.counts[i] + self._offsets[i])
            self._offsets[i] = grid.first_unread(next_index, self._lengths[i], seq_length) - self.counts[i]
            self._lengths[i] = seq_length
            self._limits[i] = self._count_limit(i)

    def _initial_length(self, name: str) -> list[int]:
        """Return the sample length and offset of a source before any change: whole spans from index 0."""
        return [self._grids[name].seq_length if name in self._grids else 0, 0]

    def _count_limit(self, i: int) -> int:
        """Return the count at which a source ends if its sample length stays."""
        name = self._names[i]
        limit = self._span_limits.get(name)
        if limit is None:
            return _NO_LIMIT
        parts = self._grids[name].parts(self._lengths[i]) if name in self._grids else 1
        return limit * parts - int(self._offsets[i])


def _check_span_lengths(saved: Mapping[str, int], current: Mapping[str, int]) -> None:
    """Refuse another span length for a source that was read: its counter would mean other tokens."""
    changed = [f"{n} {saved[n]} -> {length}" for n, length in current.items() if saved.get(n, length) != length]
    if changed:
        raise RefusedError(
            "data state: the longest sequences of a source cannot change once it was read: "
            f"{', '.join(changed)} tokens; keep the length, or give the source another name in `sources`, under "
            "which it starts from its first sample"
        )
