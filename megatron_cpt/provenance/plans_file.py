"""plans.jsonl: after which step a run went on under which run.yaml, plan and files. What any step read follows from it.

A line is added when a process goes on with something else than the one before it, and then holds the state of the blend
as well; so the file stays small, and no checkpoint has to be kept for the sake of the past. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.errors import RefusedError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.provenance.run_history import Blends, Recorded, Witness, drop_zeros, parse_blends

logger = logging.getLogger(__name__)

FILE_NAME = "plans.jsonl"

_OF_PLAN = ("steps", "phases", "sources")  # what decides the samples; the rest also depends on the number of ranks


@dataclass(frozen=True)
class PlanRecord:
    """Steps that one plan decided.

    Attributes:
        after_step: the step before the first of them.
        state: of the blend after that step; None: the start of the run.
        blends: the plan.
        fingerprints: which files the sources were.
        end: what was written down about its last step; None: that is not known, or still to come.
    """

    after_step: int
    state: Mapping[str, Any] | None
    blends: Blends
    fingerprints: Mapping[str, str]
    end: Witness | None = None

    def has(self, checkpoint: Recorded) -> bool:
        """Whether a checkpoint was written in one of its steps, and not in one of that number which was done again."""
        is_in_time = checkpoint.step > self.after_step and (self.end is None or checkpoint.step <= self.end.step)
        return is_in_time and (checkpoint.run, checkpoint.fingerprints) == (self.blends.run, self.fingerprints)


def note_plan(
    run_directory: Path,
    step: int,
    *,
    run: Mapping[str, Any],
    plan: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    fingerprints: Mapping[str, str],
) -> None:
    """Write down how a run goes on, unless it goes on as it did.

    Lines of later steps are dropped: these steps will be done again.

    Args:
        run_directory: of the run.
        step: the last step that is done.
        run: the resolved run.yaml.
        plan: what plan.json holds.
        state: of the blend after the step.
        fingerprints: which files the sources are.
    """
    try:
        before = _read_lines(run_directory)
    except RefusedError as error:  # it must not keep a run from going on
        logger.warning("%s; what earlier steps read can no longer be traced", error)
        before = []
    lines = [line for line in before if line["after_step"] < step]
    now = {"run": run, "plan": {key: plan[key] for key in _OF_PLAN}, "data_fingerprints": fingerprints}
    now = orjson.loads(orjson.dumps(now))
    if not lines or any(lines[-1].get(key) != value for key, value in now.items()):
        lines.append({"after_step": step, "state": state, **now})
    if lines != before:
        text = "".join(orjson.dumps(line).decode() + "\n" for line in lines)
        write_atomically(run_directory / FILE_NAME, text)


def read_plan_records(run_directory: Path) -> list[PlanRecord]:
    """The past of a run, oldest first.

    Raises:
        RefusedError: the file is missing or damaged.
    """
    records = [_segment(run_directory, line) for line in _read_lines(run_directory)]
    if not records:
        raise RefusedError(f"{run_directory / FILE_NAME}: missing: without it nobody knows which blend a step had")
    ends = [*(_end_before(record) for record in records[1:]), None]
    return [replace(record, end=end) for record, end in zip(records, ends, strict=True)]


def _read_lines(run_directory: Path) -> list[dict[str, Any]]:
    path = run_directory / FILE_NAME
    if not path.exists():
        return []
    try:
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        if any(not isinstance(line["after_step"], int) for line in lines):
            raise ValueError("a line without its step")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{path}: damaged ({error!r})") from error
    return lines


def _segment(run_directory: Path, line: Mapping[str, Any]) -> PlanRecord:
    step = int(line["after_step"])
    origin = f"{run_directory / FILE_NAME}, after step {step}"
    try:
        blends = parse_blends(line["run"], line["plan"], origin)
        return PlanRecord(step, line["state"], blends, line["data_fingerprints"])
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{origin}: not the plan of a run ({error!r})") from error


def _end_before(record: PlanRecord) -> Witness:
    """What was written down about the last step before a record."""
    assert record.state is not None, "only the start of a run has no state"
    step, state = record.after_step, record.state
    return Witness(f"{FILE_NAME}, step {step}", step, drop_zeros(state["counts"]), state)
