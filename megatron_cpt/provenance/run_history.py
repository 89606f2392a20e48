"""Records of a run directory: its checkpoints, and the counts in metrics.jsonl. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import read_saved_run
from megatron_cpt.data import BlendCursor, PhaseBlend
from megatron_cpt.errors import CptError, RefusedError, UserError
from megatron_cpt.files.whole_io import is_regular_file, open_reader
from megatron_cpt.planning import Segment, SpanGrid

METRICS_FILE = "metrics.jsonl"
ANOMALIES_FILE = "anomalies.jsonl"
EVENTS_FILE = "events.jsonl"
"""File with a line per start and per planned stop of the run's processes; a start without a stop was killed or failed.
"""
MALFORMED = (ValueError, TypeError, AttributeError, ArithmeticError, LookupError)
"""Errors that plain values of a wrong shape or type cause where they are used."""


@dataclass(frozen=True)
class Blends:
    """Run.yaml and plan: everything that the order of samples depends on.

    Attributes:
        origin: file and line that they were read from, for messages.
        run: the resolved run.yaml as plain values.
        phases: the plan's blends, in order.
        last_step: the plan's last step.
        limits: spans after which a source ends; a source without an entry never ends.
        segments: consecutive steps of equal batch size and sequence length, in order.
        grids: spans of each source.
    """

    origin: str
    run: Mapping[str, Any]
    phases: tuple[PhaseBlend, ...]
    last_step: int
    limits: Mapping[str, int]
    segments: tuple[Segment, ...]
    grids: Mapping[str, SpanGrid]

    @property
    def source_names(self) -> list[str]:
        """Names of all sources, in the order that decides ties."""
        return list(self.run["sources"])

    def samples_after(self, step: int) -> int:
        """Return how many samples the run has read after a step; the last segment is extended past its end."""
        after = next((segment for segment in self.segments if step <= segment.last_step), self.segments[-1])
        return after.after(step).samples

    def step_at(self, samples: int) -> int | None:
        """Return the step after which the run has read so many samples; None if that is inside a step."""
        at = next((segment for segment in self.segments if samples <= segment.end.samples), self.segments[-1])
        steps, remainder = divmod(samples - at.first_sample, at.global_batch)
        return None if remainder else at.first_step - 1 + steps

    def cursor(self) -> BlendCursor:
        """Return a cursor at the start of the run."""
        return BlendCursor(self.phases, self.source_names, limits=self.limits, grids=self.grids)


@dataclass(frozen=True)
class Recorded:
    """Records in a checkpoint: its run.yaml, the blend's state after its step, fingerprints of each source's files."""

    path: Path
    step: int
    run: Mapping[str, Any]
    data: Mapping[str, Any]
    fingerprints: Mapping[str, str]

    @property
    def witness(self) -> Witness:
        """Counts and blend state that the checkpoint recorded."""
        origin = f"{self.path.name}/{layout.STATE_FILE}"
        return Witness(origin, self.step, drop_zeros(self.data["counts"]), self.data)


@dataclass(frozen=True)
class Witness:
    """Counts that the run recorded after a step.

    Attributes:
        origin: file that has them, for messages.
        step: they were recorded after this step.
        counts: samples that each source had given; sources without any have no entry.
        data: the blend's complete state, if it was recorded.
    """

    origin: str
    step: int
    counts: dict[str, int]
    data: Mapping[str, Any] | None = None

    def agrees_with(self, data: Mapping[str, Any]) -> bool:
        """Return whether a state of the blend after the step is consistent with this record."""
        if drop_zeros(data["counts"]) != self.counts:
            return False
        if self.data is None:
            return True
        starts = [drop_zeros(state["counts_at_blend_start"]) for state in (data, self.data)]
        keys = ("phase", "weights", "lengths")
        return starts[0] == starts[1] and all(data.get(key) == self.data.get(key) for key in keys)


def read_history(run_directory: Path) -> tuple[list[Recorded], list[str]]:
    """Return the valid records of all checkpoints, oldest first, and a warning for each checkpoint that was skipped.

    Raises:
        UserError: the directory does not exist.
    """
    if not run_directory.is_dir():
        raise UserError(f"{run_directory}: no such run directory; give the `output` of a run.yaml")
    recorded, notes = [], []
    for path in layout.list_checkpoints(layout.checkpoints_folder(run_directory)):
        try:
            recorded.append(_read_checkpoint(path))
        except CptError as error:
            notes.append(f"skipped: {error}")
    return recorded, notes


def parse_blends(run: Mapping[str, Any], plan: Mapping[str, Any], origin: str) -> Blends:
    """Parse a run.yaml and its plan from plain values; one of `MALFORMED` means that they are invalid."""
    segments = [tuple(_segment(values) for values in phase["stretches"]) for phase in plan["phases"]]
    phases = tuple(_phase(phase, own) for phase, own in zip(plan["phases"], segments, strict=True))
    # a limit of 0 counts: that source ends before its first sample
    all_limits = {name: source.get("limit") for name, source in plan["sources"].items()}
    limits = {name: int(limit) for name, limit in all_limits.items() if limit is not None}
    grids = {
        name: SpanGrid(int(source["chunk_length"]), int(source["chunks_per_epoch"]))
        for name, source in plan["sources"].items()
        if source.get("chunks_per_epoch")
    }
    flat = tuple(segment for own in segments for segment in own)
    blends = Blends(origin, run, phases, int(plan["steps"]), limits, flat, grids)
    paths = [path for source in run["sources"].values() for path in _as_list(source["path"])]
    if not flat or not all(isinstance(path, str) for path in paths):
        raise ValueError("no steps, or a path that is no text")
    if type(run["seed"]) is not int or type(run["seq_length"]) is not int or run["seq_length"] < 1:
        raise ValueError(f"seed {run['seed']!r}, seq_length {run['seq_length']!r}")
    try:
        blends.cursor()  # checks that phases, weights and spans fit together
    except AssertionError as error:
        raise ValueError(str(error)) from error
    return blends


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _segment(values: Mapping[str, Any]) -> Segment:
    segment = Segment(**values)
    for name, value in values.items():
        least = 1 if name in ("first_step", "global_batch", "micro_batch", "seq_length") else 0
        if name != "is_ramp" and not (type(value) is int and least <= value < 2**62):
            raise ValueError(f"{name}: {value!r}")
    return segment


def read_counts(run_directory: Path, after_step: int, step: int) -> tuple[Witness | None, Witness | None]:
    """Read from metrics.jsonl the last counts before a step (but after `after_step`), and the first ones from it on."""
    before, path = None, run_directory / METRICS_FILE
    if not is_regular_file(path):
        return None, None
    with open_reader(path) as file:
        for raw in file:
            try:
                line = orjson.loads(raw)
                recorded_step, counts = int(line["step"]), drop_zeros(line["samples_by_source"])
            except MALFORMED:
                continue  # cut off when the process was killed, or a line of another kind
            if recorded_step <= after_step:
                continue
            witness = Witness(f"{METRICS_FILE}, step {recorded_step}", recorded_step, counts)
            if witness.step >= step:
                return before, witness
            before = witness
    return before, None


def drop_zeros(counts: Mapping[str, Any]) -> dict[str, int]:
    """Return the counts above 0, so that a source which gave no sample equals a source without an entry."""
    return {str(name): int(count) for name, count in counts.items() if count}


def check_blend_state(state: Any) -> None:
    """Raise one of `MALFORMED` unless plain values are a state of the blend."""
    for name in ("counts", "counts_at_blend_start"):
        if any(type(count) is not int or not 0 <= count < 2**62 for count in state[name].values()):
            raise ValueError(f"{name} holds something other than counts")
    kinds = {"sample": int, "phase": str, "weights": dict}
    wrong = [name for name, kind in kinds.items() if type(state[name]) is not kind]
    if wrong:
        raise TypeError(f"{', '.join(wrong)}: of another type than the state of a blend has")


def check_texts(values: Any) -> None:
    """Raise one of `MALFORMED` unless plain values are texts by name."""
    if not all(isinstance(text, str) for text in values.values()):
        raise TypeError("holds something other than texts")


def _read_checkpoint(path: Path) -> Recorded:
    saved = read_saved_run(path)
    try:
        train = saved.state["train"]
        check_blend_state(train["data"])
        check_texts(saved.state["data_fingerprints"])
        return Recorded(path, int(train["step"]), saved.run, train["data"], saved.state["data_fingerprints"])
    except MALFORMED as error:
        raise RefusedError(f"{path / layout.STATE_FILE}: not the state of a run ({error!r})") from error


def _phase(phase: Mapping[str, Any], segments: tuple[Segment, ...]) -> PhaseBlend:
    first = segments[0].first_sample
    weights = {name: float(use["weight"]) for name, use in phase["sources"].items()}
    return PhaseBlend(phase["name"], first, segments[-1].end.samples - first, weights, segments[0].seq_length)
