"""What a run directory says about its past: its checkpoints, and the counts in metrics.jsonl. Imports no torch."""

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
from megatron_cpt.plan import Segment, SpanGrid

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Blends:
    """A resolved run.yaml with its plan: all that the order of samples depends on.

    Attributes:
        origin: where it was found.
        run: run.yaml as plain values.
        phases: the blends of the plan, in order.
        last_step: the plan's last step.
        limits: spans after which a source ends, for those that do.
        segments: the steps by their shape.
        grids: the spans of each source.
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
        """In the order that decides ties."""
        return list(self.run["sources"])

    def samples_after(self, step: int) -> int:
        """Samples that the run has read after a step; beyond its end it goes on in the same way."""
        after = next((segment for segment in self.segments if step <= segment.last_step), self.segments[-1])
        return after.after(step).samples

    def step_at(self, samples: int) -> int | None:
        """The step after which the run has read so many samples; None where that is not the end of one."""
        at = next((segment for segment in self.segments if samples <= segment.end.samples), self.segments[-1])
        steps, rest = divmod(samples - at.first_sample, at.global_batch)
        return None if rest else at.first_step - 1 + steps

    def cursor(self) -> BlendCursor:
        """A cursor at the start of the run."""
        return BlendCursor(self.phases, self.source_names, limits=self.limits, grids=self.grids)


@dataclass(frozen=True)
class Recorded:
    """A checkpoint, as far as its text files go.

    Attributes:
        path: its folder.
        step: its step.
        run: its run.yaml as plain values.
        data: the blend's state after it.
        fingerprints: which files the sources were.
    """

    path: Path
    step: int
    run: Mapping[str, Any]
    data: Mapping[str, Any]
    fingerprints: Mapping[str, str]

    @property
    def witness(self) -> Witness:
        """What it says about its step."""
        origin = f"{self.path.name}/{layout.STATE_FILE}"
        return Witness(origin, self.step, drop_zeros(self.data["counts"]), self.data)


@dataclass(frozen=True)
class Witness:
    """Counts that were written down while the run went on.

    Attributes:
        origin: where.
        step: after which step.
        counts: samples each source had given; those of none are left out.
        data: the whole state of the blend, where that was written down too.
    """

    origin: str
    step: int
    counts: dict[str, int]
    data: Mapping[str, Any] | None = None

    def agrees_with(self, data: Mapping[str, Any]) -> bool:
        """Whether the blend may have had this state after the step."""
        if drop_zeros(data["counts"]) != self.counts:
            return False
        if self.data is None:
            return True
        starts = [drop_zeros(state["counts_at_blend_start"]) for state in (data, self.data)]
        return starts[0] == starts[1] and all(data.get(k) == self.data.get(k) for k in ("phase", "weights", "lengths"))


def read_history(run_directory: Path) -> tuple[list[Recorded], list[str]]:
    """All checkpoints whose records are sound, oldest first, and a line for each of the others.

    Raises:
        UserError: there is no such directory.
    """
    if not run_directory.is_dir():
        raise UserError(f"{run_directory}: no such run directory")
    recorded, notes = [], []
    for path in layout.list_checkpoints(layout.checkpoints_folder(run_directory)):
        try:
            recorded.append(_read_checkpoint(path))
        except CptError as error:
            notes.append(f"passed over: {error}")
    return recorded, notes


def parse_blends(run: Mapping[str, Any], plan: Mapping[str, Any], origin: str) -> Blends:
    """A run.yaml and its plan, both as plain values; whatever they lack is a KeyError, TypeError or ValueError."""
    segments = [tuple(Segment(**segment) for segment in phase["stretches"]) for phase in plan["phases"]]
    phases = tuple(_phase(phase, own) for phase, own in zip(plan["phases"], segments, strict=True))
    # a limit of 0 is one: that source has ended before its first sample
    given = {name: source.get("limit") for name, source in plan["sources"].items()}
    limits = {name: int(limit) for name, limit in given.items() if limit is not None}
    grids = {
        name: SpanGrid(int(source["chunk_length"]), int(source["chunks_per_epoch"]))
        for name, source in plan["sources"].items()
        if source.get("chunks_per_epoch")
    }
    flat = tuple(segment for own in segments for segment in own)
    return Blends(origin, run, phases, int(plan["steps"]), limits, flat, grids)


def read_counts(run_directory: Path, after_step: int, step: int) -> tuple[Witness | None, Witness | None]:
    """From metrics.jsonl the last line before a step that is later than `after_step`, and the first one from it on."""
    before, path = None, run_directory / METRICS_FILE
    if not path.is_file():
        return None, None
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = orjson.loads(raw)
            except ValueError:
                continue  # the line that a kill cut
            if "samples_by_source" not in line or line["step"] <= after_step:
                continue
            counts = drop_zeros(line["samples_by_source"])
            witness = Witness(f"{METRICS_FILE}, step {line['step']}", int(line["step"]), counts)
            if witness.step >= step:
                return before, witness
            before = witness
    return before, None


def drop_zeros(counts: Mapping[str, Any]) -> dict[str, int]:
    """Counts of the sources that gave something, so that a source which has not begun makes no difference."""
    return {str(name): int(count) for name, count in counts.items() if count}


def _read_checkpoint(path: Path) -> Recorded:
    saved = read_saved_run(path)
    try:
        train = saved.state["train"]
        return Recorded(path, int(train["step"]), saved.run, train["data"], saved.state["data_fingerprints"])
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{path / layout.STATE_FILE}: not the state of a run ({error!r})") from error


def _phase(phase: Mapping[str, Any], segments: tuple[Segment, ...]) -> PhaseBlend:
    first = segments[0].first_sample
    weights = {name: float(use["weight"]) for name, use in phase["sources"].items()}
    return PhaseBlend(phase["name"], first, segments[-1].end.samples - first, weights, segments[0].seq_length)
