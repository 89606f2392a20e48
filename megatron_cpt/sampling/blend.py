"""Blend: which source each sample of the run comes from.

Within a phase, each sample goes to the source that is furthest behind its share. This is the rule of megatron-core's
`build_blending_indices` (`datasets/helpers.cpp`), computed when needed instead of stored for the whole run. A source is
always less than one sample ahead of its share, and at most 1 + 1/2 + ... + 1/(n - 1) samples behind it, for n sources
(proof in docs/internals/decisions.md).

Example: the weights are 0.6 for web and 0.4 for code. Sample i goes to the larger `weight * max(i, 1) - given`:

    i   web                code               goes to
    0   0.6 - 0 =  0.6     0.4 - 0 =  0.4     web, sample 0
    1   0.6 - 1 = -0.4     0.4 - 0 =  0.4     code, sample 0
    2   1.2 - 1 =  0.2     0.8 - 1 = -0.2     web, sample 1
    3   1.8 - 2 = -0.2     1.2 - 1 =  0.2     code, sample 1
    4   2.4 - 2 =  0.4     1.6 - 2 = -0.4     web, sample 2

After these 5 samples the counters are web 3 and code 2. They are the whole state: a next phase with other weights
starts its own deficits at 0, and the first sample it takes from web is sample 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.sampling.counters import SourceCounters
from megatron_cpt.sampling.spans import SpanGrid


@dataclass(frozen=True)
class PhaseBlend:
    """Consecutive samples of the run that share one blend.

    Attributes:
        name: the phase's name, unique in the run.
        first_sample: index of the phase's first sample in the run, from 0.
        weights: share per source, summing to 1; sources outside the phase have no entry.
        seq_length: tokens per sample; None: each source's own length.
    """

    name: str
    first_sample: int
    num_samples: int
    weights: Mapping[str, float]
    seq_length: int | None = None

    @property
    def end_sample(self) -> int:
        """Index of the first sample after the phase."""
        return self.first_sample + self.num_samples


def assign(weights: npt.NDArray[np.float64], given: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int32]:
    """Choose the source of the next `count` samples of a phase.

    Sample i = given.sum(), given.sum() + 1, ... goes to the source with the largest weight * max(i, 1) - given; the
    first of them if several are equal.

    Args:
        weights: (num_sources,), summing to 1.
        given: (num_sources,), samples that each source has given in this phase; updated in place.

    Returns:
        (count,): index of the source per sample.
    """
    first = int(given.sum())
    deficits = np.empty(len(weights), np.float64)
    given_float = given.astype(np.float64)  # exact below 2^53, and avoids a conversion per sample
    sources = np.empty(count, np.int32)
    for i in range(count):
        # First the product, then the difference, each rounded to float64: as in the C++ code, so that ties are equal.
        np.multiply(weights, float(max(first + i, 1)), out=deficits)
        np.subtract(deficits, given_float, out=deficits)
        source = deficits.argmax()
        sources[i] = source
        given_float[source] += 1.0
    given += np.bincount(sources, minlength=len(given))
    return sources


class BlendCursor:
    """Cursor over the samples of the run, phase after phase.

    A source that has given its limit ends. From that sample on, the remaining sources of the blend share its weight in
    proportion to their own, as a new blend whose deficits start at 0. Example: web 0.5, code 0.3, qa 0.2; when qa ends,
    the blend becomes web 0.625, code 0.375. The counters tell which sources have ended, so this needs no extra state.

    Phases may differ in sequence length. The sample index in a source then counts samples of the phase's length, and a
    source whose length changes continues with its first unread window (`SpanGrid.first_unread`).

    Args:
        phases: in order, without gaps, the first one from sample 0.
        source_names: all sources of the run; their order decides ties.
        limits: spans (samples of the source's longest length) after which a source ends, counted over the whole run; a
            source without an entry never ends.
        grids: spans of each source; required if phases set `seq_length`.

    Attributes:
        sample: index of the next sample of the run.
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
        self._limits, self._grids = dict(limits or {}), dict(grids or {})
        self.sample = 0
        self._counters = self._restore_counters({})
        self._start_blend()

    @property
    def num_samples(self) -> int:
        """Number of samples in all phases together."""
        return self.phases[-1].end_sample

    @property
    def remaining(self) -> int:
        """Number of samples from the cursor to the end of the run."""
        return self.num_samples - self.sample

    @property
    def seq_length(self) -> int | None:
        """Tokens per sample in the current phase; None: each source's own length."""
        return self._phase.seq_length

    @property
    def counts(self) -> dict[str, int]:
        """Samples that each source has given since the start of the run."""
        return self._counters.to_dict()

    def next(self, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the next `count` samples of the run, at most `remaining`, and advance the cursor.

        Returns:
            Two int64 arrays (count,): the source of each sample (index in `source_names`), and the index of the sample
            in that source, counted from the start of the run in samples of the phase's length.

        Raises:
            UserError: all sources of the phase have ended.
        """
        assert 0 <= count <= self.remaining, f"{count} samples requested, {self.remaining} left"
        sources, sample_indices = np.empty(count, np.int64), np.empty(count, np.int64)
        start = 0
        while start < count:
            if self.sample >= self._phase.end_sample or (self._counters.remaining(self._active) <= 0).any():
                self._start_blend()
            chosen = self._choose(min(count - start, self._phase.end_sample - self.sample))
            end = start + len(chosen)
            sources[start:end], sample_indices[start:end] = chosen, self._counters.take(chosen)
            self.sample += len(chosen)
            start = end
        return sources, sample_indices

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor's state in plain JSON values."""
        counters = self._counters.state_dict()
        blend = {
            "sample": self.sample,
            "counts": counters.pop("counts"),
            "phase": self._phase.name,
            "weights": self._active_weights(),
            "counts_at_blend_start": dict(zip(self.source_names, self._blend_start.tolist(), strict=True)),
        }
        return blend | counters

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, under the phases of this cursor.

        A source that the state does not know starts at its first sample. If the phase's name and weights equal the
        state's, its blend continues sample for sample as if it had never been interrupted. If not (also because a
        limit changed), the new blend starts its deficits at 0 and does not make up for what was read before.

        Raises:
            RefusedError: the state contradicts itself, or counts spans of another length than the phases have.
        """
        counts = [int(count) for count in state["counts"].values()]
        sample = int(state["sample"])
        if sum(counts) != sample or min(counts, default=0) < 0:
            raise RefusedError(
                f"data state: the counts per source add up to {sum(counts)}, but {sample} samples were read; "
                "load another checkpoint"
            )
        self._counters = self._restore_counters(state)
        self.sample = sample
        self._start_blend()
        if self._phase.name == state["phase"] and self._active_weights() == dict(state["weights"]):
            start = state["counts_at_blend_start"]
            self._blend_start = np.array([int(start.get(name, 0)) for name in self.source_names], np.int64)
            if (self._blend_start > self._counters.counts).any():
                raise RefusedError(
                    "data state: the count of a source is lower than at the start of its blend; load another checkpoint"
                )

    def _restore_counters(self, state: Mapping[str, Any]) -> SourceCounters:
        read_names = {name for phase in self.phases for name in phase.weights}
        return SourceCounters(self.source_names, read_names, self._limits, self._grids, state)

    def _start_blend(self) -> None:
        """Start a blend at the current sample: deficits start at 0, the sources' counters continue."""
        # past the end of the run, the last phase
        phase = next((phase for phase in self.phases if self.sample < phase.end_sample), self.phases[-1])
        self._phase = phase
        sources = np.array([i for i, name in enumerate(self.source_names) if name in phase.weights], np.int64)
        if phase.seq_length is not None:
            self._counters.set_length(sources.tolist(), phase.seq_length)
        self._active = sources[self._counters.remaining(sources) > 0]
        self._weights = np.array([phase.weights[self.source_names[i]] for i in self._active], np.float64)
        if 0 < len(self._active) < len(sources):  # a complete blend keeps its weights identical bit for bit
            self._weights /= self._weights.sum()
        self._blend_start = self._counters.counts.copy()

    def _active_weights(self) -> dict[str, float]:
        """Return the weights of the current blend, without the sources that had ended when it started."""
        names = (self.source_names[i] for i in self._active)
        return dict(zip(names, self._weights.tolist(), strict=True))

    def _choose(self, count: int) -> npt.NDArray[np.int64]:
        """Return the sources of the next `count` samples, or of fewer: up to the last sample of a source that ends."""
        if not len(self._active):
            raise UserError(
                f"phase {self._phase.name}: all its sources have ended (they reached max_epochs) at sample "
                f"{self.sample} of the run; raise max_epochs or give the phase another source"
            )
        given = (self._counters.counts - self._blend_start)[self._active]
        sources: npt.NDArray[np.int64] = self._active[assign(self._weights, given, count)]
        end, remaining = count, self._counters.remaining(self._active)
        for source, left in zip(self._active[remaining < end], remaining[remaining < end].tolist(), strict=True):
            positions = np.flatnonzero(sources[:end] == source)
            if len(positions) >= left:
                end = int(positions[left - 1]) + 1
        return sources[:end]


def _check_phases(phases: tuple[PhaseBlend, ...], source_names: tuple[str, ...]) -> None:
    """Assert what the planner guarantees."""
    assert phases, "no phases"
    assert len(set(source_names)) == len(source_names), "two sources of one name"
    assert len({phase.name for phase in phases}) == len(phases), "two phases of one name"
    expected = 0
    for phase in phases:
        assert phase.first_sample == expected, f"{phase}: must start at sample {expected}"
        assert phase.num_samples >= 0, f"{phase}: negative number of samples"
        assert set(phase.weights) <= set(source_names), f"{phase}: a source is not in the run"
        assert all(weight > 0 for weight in phase.weights.values()), f"{phase}: a weight is zero or negative"
        assert abs(sum(phase.weights.values()) - 1) < 1e-6, f"{phase}: the weights do not add up to 1"
        expected = phase.end_sample
