"""What step N read, as (source, number in the source): the blend replayed, and held against what was recorded.

The samples of a step are a pure function of the plan and of the blend's state at some step before it. Which plan was in
force is known from the checkpoints: each holds the run.yaml and the plan of the process that wrote it, and a process
can only begin at a checkpoint. So the steps between two checkpoints were read under the plan of the later one, unless
the run was taken up with another blend at a checkpoint in between that is gone now; then the records do not agree, and
the other possibilities are tried. Nothing is told that the records contradict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import RefusedError
from megatron_cpt.train.run_history import Blends, Recorded, Witness

_REPLAY_SAMPLES = 1 << 16  # handed out between two looks at the progress

Progress = Callable[[int, int], None]
"""Called with the samples replayed so far, and how many there are."""


@dataclass(frozen=True)
class Start:
    """One way that a step may have come about.

    Attributes:
        step: a step before it.
        state: of the blend after that step; None: the start of the run.
        blends: the plan under which the run went on from there.
    """

    step: int
    state: Mapping[str, Any] | None
    blends: Blends


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


def possible_starts(
    before: Recorded | None, after: Recorded | None, now: Blends, line: Witness | None, step: int
) -> Iterator[Start]:
    """How the step may have come about, the likeliest first and the shortest way first.

    Args:
        before: the newest checkpoint before the step.
        after: the oldest one that is not.
        now: the run directory's own run.yaml: in force after the last checkpoint.
        line: the last counts of metrics.jsonl before the step.
        step: the step.
    """
    first_step, state = (before.step, before.data) if before is not None else (0, None)
    governing = after.blends if after is not None else now
    is_other_plan = False
    if after is not None and (begun := _blend_start(after)) is not None:
        # A blend that began where no phase of its plan does: the run was taken up there, and went by another plan.
        is_other_plan = begun.step > first_step and all(
            governing.samples_after(begun.step) != phase.first_sample for phase in governing.phases
        )
        if begun.step < step:
            if line is not None and line.step > max(first_step, begun.step):
                yield from _continued(begun, after, line)
            if begun.step > first_step:
                yield begun
            if is_other_plan:
                return
    if not is_other_plan:
        yield Start(first_step, state, governing)
    for other in (before.blends if before is not None else None, now):
        if other is not None and other is not governing and step <= other.last_step:
            yield Start(first_step, state, other)


def _blend_start(after: Recorded) -> Start | None:
    """Where the blend began that was in force when a checkpoint was written: its counts are part of the state.

    None where that is not the end of a step.
    """
    data = after.data
    at_start = {name: int(count) for name, count in data["counts_at_blend_start"].items()}
    given = sum(int(data["counts"].get(name, 0)) - count for name, count in at_start.items())
    sample = int(data["sample"]) - given
    step = after.blends.step_at(sample)
    if step is None:
        return None
    counts = {**data["counts"], **at_start}  # a source that has left the run gave nothing since
    # no phase has an empty name, so the cursor begins its blend anew here, as it did
    state = {"sample": sample, "counts": counts, "phase": "", "weights": {}, "counts_at_blend_start": at_start}
    # lengths only change where a blend begins, so they were then what they are now
    return Start(step, state | {"lengths": data.get("lengths", {})}, after.blends)


def _continued(begun: Start, after: Recorded, line: Witness) -> Iterator[Start]:
    """A blend that began somewhere, at a later step whose counts were written down; they are taken at their word."""
    assert begun.state is not None
    at_start, sample = begun.state["counts_at_blend_start"], after.blends.samples_after(line.step)
    is_whole = sum(line.counts.values()) == sample
    if is_whole and all(count <= line.counts.get(name, 0) for name, count in at_start.items()):
        yield Start(line.step, {**after.data, "sample": sample, "counts": line.counts}, after.blends)


def find_replay(starts: Iterator[Start], step: int, witness: Witness | None, progress: Progress | None) -> Replay:
    """The first possibility that agrees with what was recorded.

    Args:
        starts: the possibilities.
        step: the step.
        witness: a record at or after it; None: the first possibility is taken.
        progress: called with the samples replayed so far and how many there are.

    Raises:
        RefusedError: none agrees.
    """
    tried = []
    for start in starts:
        replay = _replay(start, step, witness.step if witness is not None else step, progress)
        if witness is None or witness.agrees_with(replay.data):
            return replay
        tried.append(f"from step {start.step} under {start.blends.origin}")
    assert witness is not None
    raise RefusedError(
        f"step {step}: what it read cannot be known: {witness.origin} is at odds with a replay "
        f"{', or one '.join(tried)}; the run went on from a checkpoint that is gone, under a blend that is not known"
    )


def _replay(start: Start, step: int, until: int, progress: Progress | None) -> Replay:
    """Walk the blend from a start through a step up to a later one."""
    blends, cursor = start.blends, start.blends.cursor()
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
