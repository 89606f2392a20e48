"""What step N read, as (source, number in the source): the blend replayed, and held against what was recorded.

The samples of a step are a pure function of the plan in force and of the blend's state at some step before it, as long
as both belong to the same record of the run's past (`plans_file.py`). Checkpoints and lines of metrics.jsonl only make
the way shorter, and confirm what is found. Nothing is told that the records contradict.
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

_REPLAY_SAMPLES = 1 << 16  # handed out between two looks at the progress

Progress = Callable[[int, int], None]
"""Called with the samples replayed so far, and how many there are."""


@dataclass(frozen=True)
class Start:
    """A place from where a step can be reached.

    Attributes:
        step: a step before it.
        state: of the blend after that step; None: the start of the run.
    """

    step: int
    state: Mapping[str, Any] | None


@dataclass(frozen=True)
class Replay:
    """What a step read.

    Attributes:
        start: where the replay began.
        phase: the phase of the step.
        sources: int64 (global_batch,), the source of each sample: a place in the plan's sources.
        ks: int64 (global_batch,), its number in the source.
        seq_length: tokens in each of them.
        data: the state of the blend at the end of the replay.
    """

    start: Start
    phase: str
    sources: npt.NDArray[np.int64]
    ks: npt.NDArray[np.int64]
    seq_length: int
    data: Mapping[str, Any]


def possible_starts(record: PlanRecord, recorded: Sequence[Recorded], line: Witness | None, step: int) -> list[Start]:
    """From where the step can be reached, the shortest way first.

    Args:
        record: the one that the step belongs to.
        recorded: its checkpoints, oldest first.
        line: the last counts of metrics.jsonl in the record before the step.
        step: the step.
    """
    starts = [Start(record.after_step, record.state)]
    starts += [Start(one.step, one.data) for one in recorded if one.step < step][-1:]
    after = next((one for one in recorded if one.step >= step), None)
    if after is not None:
        begun = _blend_start(after, record.blends)
        if begun is not None and record.after_step < begun.step < step:
            starts.append(begun)
        if begun is not None and line is not None and begun.step < line.step:
            starts += _continued(after, line, record.blends)
    return sorted(starts, key=lambda start: -start.step)


def _blend_start(after: Recorded, blends: Blends) -> Start | None:
    """Where the blend began that was in force when a checkpoint was written: its counts are part of the state.

    None where that is not the end of a step.
    """
    data = after.data
    at_start = {name: int(count) for name, count in data["counts_at_blend_start"].items()}
    given = sum(int(data["counts"].get(name, 0)) - count for name, count in at_start.items())
    sample = int(data["sample"]) - given
    step = blends.step_at(sample)
    if step is None:
        return None
    counts = {**data["counts"], **at_start}  # a source that has left the run gave nothing since
    # no phase has an empty name, so the cursor begins its blend anew here, as it did; lengths only change where a blend
    # begins, so they were then what they are now
    return Start(step, {**data, "sample": sample, "counts": counts, "phase": "", "weights": {}})


def _continued(after: Recorded, line: Witness, blends: Blends) -> Iterator[Start]:
    """The blend of a checkpoint at an earlier step whose counts were written down; they are taken at their word."""
    at_start, sample = after.data["counts_at_blend_start"], blends.samples_after(line.step)
    is_whole = sum(line.counts.values()) == sample
    if is_whole and all(count <= line.counts.get(name, 0) for name, count in at_start.items()):
        yield Start(line.step, {**after.data, "sample": sample, "counts": line.counts})


def find_replay(
    starts: Sequence[Start], blends: Blends, step: int, witness: Witness | None, progress: Progress | None
) -> Replay:
    """The first replay that agrees with what was recorded.

    Args:
        starts: from where to try.
        blends: the plan in force.
        step: the step.
        witness: a record at or after it; None: the first one is taken.
        progress: called with the samples replayed so far and how many there are.

    Raises:
        RefusedError: none agrees.
    """
    for start in starts:
        replay = _replay(start, blends, step, witness.step if witness is not None else step, progress)
        if witness is None or witness.agrees_with(replay.data):
            return replay
    assert witness is not None
    tried = ", or one ".join(f"from step {start.step}" for start in starts)
    raise RefusedError(
        f"step {step}: what it read cannot be known: {witness.origin} is at odds with a replay {tried} "
        f"under {blends.origin}"
    )


def _replay(start: Start, blends: Blends, step: int, until: int, progress: Progress | None) -> Replay:
    """Walk the blend from a start through a step up to a later one."""
    cursor = blends.cursor()
    if start.state is not None:
        cursor.load_state_dict(start.state)
    first, expected = cursor.sample, blends.samples_after(start.step)
    total = min(blends.samples_after(until), cursor.num_samples) - first
    if first != expected:
        raise RefusedError(f"step {start.step}: its state is that of {first} samples, not of {expected}")

    def walk(end: int) -> None:
        while cursor.sample < end:
            cursor.next(min(_REPLAY_SAMPLES, end - cursor.sample))
            if progress is not None:
                progress(cursor.sample - first, total)

    before = blends.samples_after(step - 1)
    walk(before)
    sources, ks = cursor.next(blends.samples_after(step) - before)
    phase, length = str(cursor.state_dict()["phase"]), cursor.seq_length
    assert length is not None
    walk(first + total)
    return Replay(start, phase, sources, ks, length, cursor.state_dict())
