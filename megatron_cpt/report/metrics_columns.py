"""metrics.jsonl as columns of numbers, read once and then only as far as it has grown.

A million lines take 800 MB of JSON and 100 MB as columns. A block of lines is parsed in one call; a block with anything
unexpected in it is read again line by line, and what is not a line of metrics is counted and skipped.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import orjson

from megatron_cpt.files.whole_io import open_reader

SCALARS = (
    *("tokens", "lr", "loss", "grad_norm", "tokens_per_second", "step_seconds", "data_wait_seconds"),
    *("sync_wait_seconds", "pause_seconds", "mfu", "tflops_per_gpu", "peak_memory_gib"),
)
"""Numbers of a training line that become columns; a missing one is NaN."""

MAX_SOURCES = 64
"""Sources that get a column of losses; a run with a thousand of them would not fit into memory."""

MAX_STEP = 1 << 53
"""Steps below it are exact in JavaScript; no run gets near it."""

_BLOCK_BYTES = 1 << 16  # larger blocks leave the processor's cache
_NAN = math.nan

Results = dict[str, dict[str, float]]
"""Metrics by task, as in an evaluation line."""

Directions = dict[tuple[str, str], bool]
"""True where a higher value is better, by task and metric."""


@dataclass
class MetricsColumns:
    """Content of metrics.jsonl.

    When a line repeats an earlier step, a later life of the run has resumed from a checkpoint before it: all lines from
    that step on are replaced.

    Attributes:
        steps: step of each training line, rising.
        scalars: a column by name of `SCALARS`.
        loss_by_source: a column by source, at most `MAX_SOURCES`.
        last: the newest training line.
        phases: (step, name) of the first line of each phase.
        validations: held-out loss by source, by step.
        validations_ema: held-out loss of the moving average of the weights by source, by step.
        evaluations: metrics by task, by step.
        evaluations_ema: metrics of the moving average by task, by step.
        higher_is_better: by task and metric, as far as the lines of evaluations say it.
        evaluated_tasks: number of documents and other facts of each task, by step.
        resumed_after: for each repeat, the last step that was kept.
        num_foreign: lines that are no metrics.
        first_foreign: number of the first one.
        is_torn: the file ends in half a line.
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    scalars: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in SCALARS})
    loss_by_source: dict[str, array[float]] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    phases: list[tuple[int, str]] = field(default_factory=list)
    validations: dict[int, dict[str, float]] = field(default_factory=dict)
    validations_ema: dict[int, dict[str, float]] = field(default_factory=dict)
    evaluations: dict[int, Results] = field(default_factory=dict)
    evaluations_ema: dict[int, Results] = field(default_factory=dict)
    higher_is_better: Directions = field(default_factory=dict)
    evaluated_tasks: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    resumed_after: list[int] = field(default_factory=list)
    num_lines: int = 0
    num_foreign: int = 0
    first_foreign: int = 0
    is_torn: bool = False
    hides_sources: bool = False

    def add_block(self, lines: Sequence[bytes]) -> None:
        """Add complete lines in their order."""
        try:
            parsed = orjson.loads(b"[" + b",".join(lines) + b"]")
            is_fast = len(parsed) == len(lines) and self._add_fast(parsed)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            is_fast = False
        if is_fast:
            self.num_lines += len(lines)
            return
        for line in lines:
            self.num_lines += 1
            if line.strip() and not self._add_line(line):
                self.num_foreign += 1
                self.first_foreign = self.first_foreign or self.num_lines

    def _add_fast(self, lines: list[dict[str, Any]]) -> bool:
        """Add lines that all are as `train` writes them; return False, with nothing added, if they are not."""
        training = [line for line in lines if "loss" in line]
        steps = array("q", [line["step"] for line in training])
        last = self.steps[-1] if self.steps else -1
        if steps and steps[-1] >= MAX_STEP:
            return False
        if any(after <= before for before, after in zip(chain([last], steps), steps, strict=False)):
            return False
        columns = {
            name: array("d", [_NAN if (value := line.get(name)) is None else value for line in training])
            for name in SCALARS
        }
        by_source = [line.get("loss_by_source") or {} for line in training]
        names = dict.fromkeys(chain.from_iterable(by_source))
        sources = {
            name: array("d", [_NAN if (value := losses.get(name)) is None else value for losses in by_source])
            for name in self._known_sources(names)
        }
        phases = [line.get("phase") for line in training]
        others = [line for line in lines if "loss" not in line]
        if not all(map(_is_held_out, others)):
            return False
        self._append(steps, columns, sources)
        self._note_phases(steps, phases)
        if training:
            self.last = training[-1]
        for line in others:
            self._add_held_out(line)
        return True

    def _add_line(self, raw: bytes) -> bool:
        """Add one line; return False if it is no line of metrics."""
        try:
            line = orjson.loads(raw)
        except ValueError:
            return False
        step = line.get("step") if isinstance(line, dict) else None
        if not is_step(step):
            return False
        if "loss" not in line:
            if not _is_held_out(line):
                return False
            self._add_held_out(line)
            return True
        if self.steps and step <= self.steps[-1]:
            self._drop_from(step)
        losses = {name: number(value) for name, value in as_mapping(line.get("loss_by_source")).items()}
        names = self._known_sources(losses)
        self._append(
            array("q", [step]),
            {name: array("d", [number(line.get(name))]) for name in SCALARS},
            {name: array("d", [losses.get(name, _NAN)]) for name in names},
        )
        self._note_phases([step], [line.get("phase")])
        self.last = line
        return True

    def _known_sources(self, names: Iterable[str]) -> list[str]:
        """Return the sources that have or get a column."""
        known = dict.fromkeys(chain(self.loss_by_source, names))
        self.hides_sources |= len(known) > MAX_SOURCES
        return list(known)[:MAX_SOURCES]

    def _append(
        self, steps: array[int], columns: Mapping[str, array[float]], sources: Mapping[str, array[float]]
    ) -> None:
        for name, values in sources.items():
            if name not in self.loss_by_source:
                self.loss_by_source[name] = array("d", [_NAN]) * len(self.steps)
            self.loss_by_source[name].extend(values)
        for name, values in columns.items():
            self.scalars[name].extend(values)
        self.steps.extend(steps)

    def _note_phases(self, steps: Sequence[int], phases: Sequence[Any]) -> None:
        current = self.phases[-1][1] if self.phases else None
        if phases and all(phase == current for phase in phases):
            return
        for step, phase in zip(steps, phases, strict=True):
            if isinstance(phase, str) and phase != current:
                self.phases.append((step, phase))
                current = phase

    def _add_held_out(self, line: Mapping[str, Any]) -> None:
        step = line["step"]
        for key, losses in (("validation", self.validations), ("validation_ema", self.validations_ema)):
            if found := {name: number(loss) for name, loss in as_mapping(line.get(key)).items()}:
                losses[step] = found
        for key, results in (("evaluation", self.evaluations), ("evaluation_ema", self.evaluations_ema)):
            if evaluation := clean_results(line.get(key)):
                results[step] = results.get(step, {}) | evaluation
        self.higher_is_better |= clean_directions(line.get("higher_is_better"))
        if tasks := as_mapping(line.get("tasks")):
            self.evaluated_tasks[step] = tasks

    def _drop_from(self, step: int) -> None:
        """Drop the lines from a step on, which a later life of the run has repeated."""
        kept = next(index for index, known in enumerate(self.steps) if known >= step)
        del self.steps[kept:]
        for column in (*self.scalars.values(), *self.loss_by_source.values()):
            del column[kept:]
        self.phases = [(first, name) for first, name in self.phases if first < step]
        held_out = (self.validations, self.validations_ema, self.evaluations, self.evaluations_ema)
        for by_step in (*held_out, self.evaluated_tasks):
            for at in [at for at in by_step if at >= step]:
                del by_step[at]
        self.resumed_after.append(step - 1)


class MetricsReader:
    """Reader of a metrics.jsonl that may still grow, or be rewritten by a run that resumes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = -1, 0
        self.columns = MetricsColumns()

    def update(self) -> MetricsColumns:
        """Read the lines that were appended since the last call, and return all columns.

        Raises:
            OSError: the file cannot be read; a missing one has no lines.
        """
        if not self._path.exists():
            self.columns = MetricsColumns()
            return self.columns
        with open_reader(self._path) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset, self.columns = status.st_ino, 0, MetricsColumns()
            file.seek(self._offset)
            rest = bytearray()
            while block := file.read(_BLOCK_BYTES):
                whole, newline, tail = block.rpartition(b"\n")
                if not newline:
                    rest += block
                    continue
                self.columns.add_block(bytes(rest + whole).split(b"\n"))
                self._offset += len(rest) + len(whole) + 1
                rest = bytearray(tail)
            self.columns.is_torn = bool(rest.strip())
        return self.columns


def is_step(value: Any) -> TypeGuard[int]:
    """Return whether a value from a file of unknown content is the number of a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_STEP


def number(value: Any) -> float:
    """Return a number from a file of unknown content; NaN for anything else, such as null, which stands for NaN."""
    try:
        return float(value) if isinstance(value, int | float) else _NAN
    except OverflowError:
        return _NAN


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a value that should be a JSON object; anything else is empty."""
    return value if isinstance(value, dict) else {}


def clean_results(value: Any) -> Results:
    """Return the numbers of `{TASK: {METRIC: float}}`, without anything else that is in it."""
    return {
        task: numbers
        for task, metrics in as_mapping(value).items()
        if (numbers := {name: number(one) for name, one in as_mapping(metrics).items() if not math.isnan(number(one))})
    }


def clean_directions(value: Any) -> Directions:
    """Return the answers of `{TASK: {METRIC: bool}}`, without anything else that is in it."""
    return {
        (task, metric): is_higher
        for task, metrics in as_mapping(value).items()
        for metric, is_higher in as_mapping(metrics).items()
        if isinstance(is_higher, bool)
    }


def _is_held_out(line: Any) -> bool:
    """Return whether a line without a loss has held-out losses or evaluations."""
    return (
        isinstance(line, dict)
        and is_step(line.get("step"))
        and any(isinstance(line.get(key), dict) for key in ("validation", "evaluation"))
    )
