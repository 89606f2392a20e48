"""Replay of the blend up to a step, to find its samples, and comparison of the result with what the run recorded.

The samples of a step follow from the plan it was in (`plans_file.py`) and from the blend's state at any earlier step of
that plan. Checkpoints and lines of metrics.jsonl make the replay shorter and confirm its result; a result that a record
contradicts is refused. Example, for step 17 of a run with checkpoints at steps 10 and 20: the replay starts from the
state at step 10, notes the samples of step 17, continues to step 20, and must arrive at the state of that checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import RefusedError
from megatron_cpt.provenance.plans_file import PlanRecord
from megatron_cpt.provenance.run_history import Blends, Recorded, Witness

_REPLAY_SAMPLES = 1 << 16  # samples between two calls of `progress`

Progress = Callable[[int, int], None]
"""Callback with the number of samples replayed so far and their total."""


@dataclass(frozen=True)
class Start:
    """Starting point of a replay: the blend's state after a step; None: the start of the run."""

    step: int
    state: Mapping[str, Any] | None


@dataclass(frozen=True)
class Replay:
    """Result of a replay: the samples of a step.

    Attributes:
        sources: int64 (global_batch,), index of each sample's source in the plan's sources.
        sample_indices: int64 (global_batch,), index of each sample in its source.
        seq_length: tokens that each sample trains on.
        data: the blend's state at the end of the replay.
    """

    start: Start
    phase: str
    sources: npt.NDArray[np.int64]
    sample_indices: npt.NDArray[np.int64]
    seq_length: int
    data: Mapping[str, Any]


def possible_starts(record: PlanRecord, recorded: Sequence[Recorded], line: Witness | None, step: int) -> list[Start]:
    """Return the starting points for a replay of a step, nearest first.

    They come from the plan, from its checkpoints `recorded` (oldest first), and from `line`, its last counts in
    metrics.jsonl before the step.
    """
    starts = [Start(record.after_step, record.state)]
    starts += [Start(one.step, one.data) for one in recorded if one.step < step][-1:]
    after = next((one for one in recorded if one.step >= step), None)
    if after is not None:
        blend_start = _blend_start(after, record.blends)
        if blend_start is not None and record.after_step < blend_start.step < step:
            starts.append(blend_start)
        if blend_start is not None and line is not None and blend_start.step < line.step:
            starts += _start_from_line(after, line, record.blends)
    return sorted(starts, key=lambda start: -start.step)


def _blend_start(after: Recorded, blends: Blends) -> Start | None:
    """Return the start of the blend that a later checkpoint was in: its state has the counts at that point.

    Returns None if the blend did not start at the end of a step.
    """
    data = after.data
    at_start = {name: int(count) for name, count in data["counts_at_blend_start"].items()}
    given = sum(int(data["counts"].get(name, 0)) - count for name, count in at_start.items())
    sample = int(data["sample"]) - given
    step = blends.step_at(sample)
    if step is None:
        return None
    counts = {**data["counts"], **at_start}  # a source that has left the run has given nothing since
    # No phase has an empty name, so the cursor starts a new blend here, as the run did. Sample lengths change only at
    # the start of a blend, so the checkpoint's lengths are valid here too.
    return Start(step, {**data, "sample": sample, "counts": counts, "phase": "", "weights": {}})


def _start_from_line(after: Recorded, line: Witness, blends: Blends) -> Iterator[Start]:
    """Yield the state of a later checkpoint's blend at a line of metrics.jsonl, if the line's counts are possible."""
    at_start, sample = after.data["counts_at_blend_start"], blends.samples_after(line.step)
    is_complete = sum(line.counts.values()) == sample
    if is_complete and all(count <= line.counts.get(name, 0) for name, count in at_start.items()):
        yield Start(line.step, {**after.data, "sample": sample, "counts": line.counts})


def find_replay(
    starts: Sequence[Start], blends: Blends, step: int, witness: Witness | None, progress: Progress | None
) -> Replay:
    """Return the first replay that agrees with what the run recorded.

    Without a witness, a recorded state at or after the step, the first replay is returned.

    Raises:
        RefusedError: no replay agrees.
    """
    for start in starts:
        replay = _replay(start, blends, step, witness.step if witness is not None else step, progress)
        if witness is None or witness.agrees_with(replay.data):
            return replay
    assert witness is not None
    tried = ", or one ".join(f"from step {start.step}" for start in starts)
    raise RefusedError(
        f"step {step}: its samples cannot be determined: {witness.origin} contradicts a replay {tried} "
        f"under {blends.origin}"
    )


def _replay(start: Start, blends: Blends, step: int, until: int, progress: Progress | None) -> Replay:
    cursor = blends.cursor()
    if start.state is not None:
        cursor.load_state_dict(start.state)
    first, expected = cursor.sample, blends.samples_after(start.step)
    total = min(blends.samples_after(until), cursor.num_samples) - first
    if first != expected:
        raise RefusedError(f"step {start.step}: its state has read {first} samples, but the plan reads {expected}")

    def advance(end: int) -> None:
        while cursor.sample < end:
            cursor.next(min(_REPLAY_SAMPLES, end - cursor.sample))
            if progress is not None:
                progress(cursor.sample - first, total)

    before = blends.samples_after(step - 1)
    advance(before)
    sources, sample_indices = cursor.next(blends.samples_after(step) - before)
    phase, length = str(cursor.state_dict()["phase"]), cursor.seq_length
    assert length is not None
    advance(first + total)
    return Replay(start, phase, sources, sample_indices, length, cursor.state_dict())
