"""plans.jsonl: every run.yaml, plan and set of data files that a run has followed, and from which step on.

Each line also has the id of the run, which its checkpoints repeat, and the first line tells whether any was published.
A line is added only when a run starts or resumes with something changed. It includes the state of the blend at that
step, so the samples of every step can be found without keeping old checkpoints. Example: a run that changes its blend
after step 8 has two lines, with after_step 0 and 8.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.errors import RefusedError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.whole_io import is_regular_file, read_file
from megatron_cpt.provenance.run_history import (
    MALFORMED,
    Blends,
    Recorded,
    Witness,
    check_blend_state,
    check_texts,
    drop_zeros,
    parse_blends,
)

logger = logging.getLogger(__name__)

FILE_NAME = "plans.jsonl"
_HAS_SAVED = "has_saved"

_PLAN_KEYS = ("steps", "phases", "sources")  # they decide the samples; the others also depend on the number of ranks


@dataclass(frozen=True)
class StartedRun:
    """Run that a run directory belongs to.

    Attributes:
        run_id: made at its first start; None: started by a version without ids.
        has_saved: it has published a checkpoint. False only if that is certain.
    """

    run_id: str | None
    has_saved: bool


@dataclass(frozen=True)
class PlanRecord:
    """Consecutive steps that followed one plan.

    Attributes:
        after_step: the plan's first step is after_step + 1.
        state: the blend's state after step `after_step`; None: the start of the run.
        blends: the plan.
        fingerprints: fingerprint of each source's files.
        end: recorded state after the plan's last step; None for the newest plan.
    """

    after_step: int
    state: Mapping[str, Any] | None
    blends: Blends
    fingerprints: Mapping[str, str]
    end: Witness | None = None

    def has(self, checkpoint: Recorded) -> bool:
        """Return whether a checkpoint was saved under this plan.

        A checkpoint of a step in the range may be older: from before the run was rolled back and changed.
        """
        is_in_range = checkpoint.step > self.after_step and (self.end is None or checkpoint.step <= self.end.step)
        return is_in_range and (checkpoint.run, checkpoint.fingerprints) == (self.blends.run, self.fingerprints)


def note_plan(
    run_directory: Path,
    step: int,
    *,
    run_id: str,
    run: Mapping[str, Any],
    plan: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    fingerprints: Mapping[str, str],
) -> None:
    """Record the plan that a run follows from now on, unless it equals the plan so far.

    Lines of later steps are dropped, because those steps will run again. A damaged file is kept under another name.

    Args:
        run_directory: of the run.
        step: the last completed step.
        run_id: id of the run.
        run, plan: the resolved run.yaml and the content of plan.json.
        state: the blend's state after the step.
        fingerprints: of each source's files.
    """
    try:
        before = _read_lines(run_directory)
    except RefusedError as error:  # a damaged record must not prevent training
        logger.warning("%s; the samples of earlier steps can no longer be traced", error)
        before = []
        os.replace(run_directory / FILE_NAME, run_directory / f"{FILE_NAME}.damaged")
    lines = [line for line in before if line["after_step"] < step]
    parts = {key: plan[key] for key in _PLAN_KEYS}
    now = {"run_id": run_id, "run": run, "plan": parts, "data_fingerprints": fingerprints}
    now = orjson.loads(orjson.dumps(now))
    if not lines or any(lines[-1].get(key) != value for key, value in now.items()):
        lines.append({"after_step": step, "state": state, **now})
    if step:
        lines[0] = {**lines[0], _HAS_SAVED: True}
    if lines != before:
        _write_lines(run_directory, lines)


def note_first_checkpoint(run_directory: Path) -> None:
    """Record that the run has published a checkpoint: from now on it never starts over by itself.

    Raises:
        RefusedError: the file is missing or damaged.
        OSError: it cannot be written.
    """
    lines = _read_lines(run_directory)
    if not lines:
        raise RefusedError(f"{run_directory / FILE_NAME}: missing")
    _write_lines(run_directory, [{**lines[0], _HAS_SAVED: True}, *lines[1:]])


def read_started_run(run_directory: Path) -> StartedRun | None:
    """Return the run that a directory belongs to; None if plans.jsonl is missing or damaged."""
    try:
        lines = _read_lines(run_directory)
    except RefusedError:
        return None
    if not lines:
        return None
    run_id = lines[-1].get("run_id")
    return StartedRun(run_id, run_id is None or _HAS_SAVED in lines[0] or lines[-1]["after_step"] > 0)


def read_plan_records(run_directory: Path) -> list[PlanRecord]:
    """Return the plans of a run, oldest first.

    Raises:
        RefusedError: the file is missing or damaged.
    """
    records = [_parse_record(run_directory, line) for line in _read_lines(run_directory)]
    if not records:
        raise RefusedError(
            f"{run_directory / FILE_NAME}: missing: without it the blend of a step is unknown; restore it from a copy"
        )
    ends = [*(_end_before(record) for record in records[1:]), None]
    return [replace(record, end=end) for record, end in zip(records, ends, strict=True)]


def _write_lines(run_directory: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(run_directory / FILE_NAME, b"".join(orjson.dumps(line) + b"\n" for line in lines))


def _read_lines(run_directory: Path) -> list[dict[str, Any]]:
    path = run_directory / FILE_NAME
    if not is_regular_file(path):  # a named pipe would block the read
        return []
    try:
        lines = [orjson.loads(line) for line in read_file(path).splitlines()]
        if any(not isinstance(line["after_step"], int) for line in lines):
            raise ValueError("a line without after_step")
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{path}: damaged ({error!r}); restore it from a copy") from error
    return lines


def _parse_record(run_directory: Path, line: Mapping[str, Any]) -> PlanRecord:
    step = int(line["after_step"])
    origin = f"{run_directory / FILE_NAME}, after step {step}"
    try:
        blends = parse_blends(line["run"], line["plan"], origin)
        state, fingerprints = line["state"], line["data_fingerprints"]
        if state is not None:
            check_blend_state(state)
        check_texts(fingerprints)
        return PlanRecord(step, state, blends, fingerprints)
    except MALFORMED as error:
        raise RefusedError(f"{origin}: not the plan of a run ({error!r}); restore the file from a copy") from error


def _end_before(record: PlanRecord) -> Witness:
    """Return the recorded state before a plan, which is the end of the previous plan."""
    if record.state is None:
        raise RefusedError(f"{record.blends.origin}: has no state of the blend; restore the file from a copy")
    step, state = record.after_step, record.state
    return Witness(f"{FILE_NAME}, step {step}", step, drop_zeros(state["counts"]), state)
