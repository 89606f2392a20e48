"""Files of a run, as one record; a file or line that cannot be read is skipped and named in the notes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.checkpoint import layout
from megatron_cpt.config import read_mapping
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.files.whole_io import read_file
from megatron_cpt.planning import Schedule
from megatron_cpt.provenance.plans_file import FILE_NAME as PLANS_FILE
from megatron_cpt.provenance.protected_files import RUN_RECORDS
from megatron_cpt.provenance.run_history import ANOMALIES_FILE, EVENTS_FILE, METRICS_FILE
from megatron_cpt.report.metrics_columns import (
    MetricsColumns,
    MetricsReader,
    Results,
    as_mapping,
    is_step,
    number,
)
from megatron_cpt.report.result_files import MeasuredTasks, Measurement, ResultFiles, find_results

_MAX_EVENTS = 10_000
_MAX_KINDS = 4  # different measurements of a task that a note lists


@dataclass(frozen=True)
class PhaseRecord:
    """Phase of the plan: its name, its steps and its tokens."""

    name: str
    first_step: int
    last_step: int
    tokens: float


@dataclass(frozen=True)
class CheckpointRecord:
    """Newest checkpoint of a run: its name, the hash of its manifest, and its state.json."""

    name: str
    digest: str
    state: Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run as its files describe it; a missing file leaves its field empty.

    Attributes:
        title: name of the run; distinct from the other runs of a report.
        config: the resolved run.yaml.
        plan: plan.json.
        phases: of the plan, in order.
        schedule: of the plan; None: unknown.
        metrics: columns of metrics.jsonl.
        evaluations: metrics by task, by step: evaluation lines and the results.json files of `evaluate`.
        evaluations_ema: the same of the moving average of the weights.
        higher_is_better: by task and metric, as far as a file says it.
        measured_tasks: documents and prompts of the evaluations, where they are recorded.
        anomalies: lines of anomalies.jsonl, in order of their steps.
        events: lines of events.jsonl: starts and stops, oldest first.
        plans: lines of plans.jsonl.
        checkpoints: names, oldest first.
        newest: the newest checkpoint.
        notes: files and lines that could not be read.
    """

    folder: Path
    title: str
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    phases: tuple[PhaseRecord, ...]
    schedule: Schedule | None
    metrics: MetricsColumns
    evaluations: Mapping[int, Results]
    evaluations_ema: Mapping[int, Results]
    higher_is_better: Mapping[tuple[str, str], bool]
    measured_tasks: MeasuredTasks
    anomalies: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    plans: Sequence[Mapping[str, Any]]
    checkpoints: Sequence[str]
    newest: CheckpointRecord | None
    notes: Sequence[str]

    @property
    def step(self) -> int:
        """Last step with a line of metrics; 0 without one."""
        return max([0, *self.metrics.steps[-1:], *self.metrics.validations, *self.evaluations])

    @property
    def planned_steps(self) -> int | None:
        """Steps of the plan; None: unknown."""
        steps = self.plan.get("steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def is_on_cpu(self) -> bool:
        """True if a start names a CPU, whose memory no plan predicts."""
        return any(line.get("device") == "cpu" for line in self.events)

    @property
    def switches(self) -> tuple[tuple[int, str], ...]:
        """Last step of each phase but the last, and the name of the phase that follows."""
        if self.phases:
            return tuple(
                (before.last_step, after.name) for before, after in zip(self.phases, self.phases[1:], strict=False)
            )
        return tuple((step - 1, name) for step, name in self.metrics.phases[1:])


class RunReader:
    """Reader of a run directory that a running job may still write to.

    Raises:
        UserError: the folder does not exist, or holds no run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such run directory; give the `output` of a run.yaml")
        expected = (layout.RUN_FILE, layout.PLAN_FILE, METRICS_FILE)
        if not any((folder / name).is_file() for name in expected):
            raise UserError(
                f"{folder}: not a run directory: it has none of {', '.join(expected)}; give the `output` of a run.yaml"
            )
        self._metrics = MetricsReader(folder / METRICS_FILE)

    def state(self) -> str:
        """Return a text that changes when the files of the run change."""
        paths = [self.folder / name for name in RUN_RECORDS]
        paths += [layout.checkpoints_folder(self.folder) / layout.LATEST_FILE, *find_results(self.folder)]
        stats = [path.stat() for path in paths if path.exists()]
        text = ",".join(f"{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self) -> RunRecord:
        """Read the run; metrics.jsonl is read from where the previous call stopped."""
        notes: list[str] = []
        config = _read_yaml(self.folder / layout.RUN_FILE, notes)
        plan = _read_json(self.folder / layout.PLAN_FILE, notes)
        metrics = self._read_metrics(notes)
        evaluations, evaluations_ema = (
            {step: dict(results) for step, results in by_step.items()}
            for by_step in (metrics.evaluations, metrics.evaluations_ema)
        )
        steps = metrics.steps[-1] if metrics.steps else max(metrics.validations, default=0)
        files = ResultFiles(self.folder, config, steps, notes)
        for step, tasks in metrics.evaluated_tasks.items():
            line = f"{METRICS_FILE}, step {step:,}"
            files.note_measurements(line, "raw", step, tasks)
            if step in metrics.evaluations_ema:
                files.note_measurements(line, "ema", step, tasks)
        directions = metrics.higher_is_better | files.add_to({"raw": evaluations, "ema": evaluations_ema})
        anomalies = _read_lines(self.folder / ANOMALIES_FILE, notes)
        by_step = {line["step"]: line for line in anomalies if is_step(line.get("step"))}
        checkpoints = [path.name for path in layout.list_checkpoints(layout.checkpoints_folder(self.folder))]
        return RunRecord(
            folder=self.folder,
            title=str(config.get("name") or plan.get("name") or self.folder.resolve().name),
            config=config,
            plan=plan,
            phases=_phases(plan, notes),
            schedule=_schedule(plan),
            metrics=metrics,
            evaluations=dict(sorted(evaluations.items())),
            evaluations_ema=dict(sorted(evaluations_ema.items())),
            higher_is_better=directions,
            measured_tasks=files.measured_tasks,
            anomalies=[by_step[step] for step in sorted(by_step)],
            events=_read_lines(self.folder / EVENTS_FILE, notes)[-_MAX_EVENTS:],
            plans=_read_lines(self.folder / PLANS_FILE, notes),
            checkpoints=checkpoints,
            newest=_read_checkpoint(layout.checkpoints_folder(self.folder) / checkpoints[-1], notes)
            if checkpoints
            else None,
            notes=tuple(notes),
        )

    def _read_metrics(self, notes: list[str]) -> MetricsColumns:
        path = self.folder / METRICS_FILE
        if not path.is_file():
            notes.append(f"{METRICS_FILE}: missing, so nothing of what happened in training is known")
            return MetricsColumns()
        try:
            metrics = self._metrics.update()
        except OSError as error:
            notes.append(f"{METRICS_FILE}: cannot be read: {error.strerror}")
            return MetricsColumns()
        if metrics.num_foreign:
            lines = "line is" if metrics.num_foreign == 1 else "lines are"
            notes.append(
                f"{METRICS_FILE}: {metrics.num_foreign:,} {lines} no metrics and skipped, the first is line "
                f"{metrics.first_foreign:,}"
            )
        if metrics.is_torn:
            notes.append(f"{METRICS_FILE}: the last line is cut off and skipped")
        if metrics.hides_sources:
            notes.append(f"{METRICS_FILE}: only the first {len(metrics.loss_by_source)} sources have a loss curve")
        if not metrics.validations:
            notes.append("no held-out losses: the run has no `validation` section, or has not reached a validation")
        return metrics


def _read_yaml(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        notes.append(f"{path.name}: missing, so the configuration is unknown")
        return {}
    try:
        return read_mapping(path)
    except (CptError, OSError) as error:
        notes.append(f"{path.name}: skipped: {error}")
        return {}


def _read_json(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        notes.append(f"{path.name}: missing, so nothing can be compared with the plan")
        return {}
    try:
        content = orjson.loads(read_file(path))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name}: damaged, skipped ({error})")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name}: damaged, skipped (not an object)")
        return {}
    return content


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        raw = read_file(path).splitlines()
    except OSError as error:
        notes.append(f"{path.name}: cannot be read: {error.strerror}")
        return []
    lines = [_parse_object(line) for line in raw]
    found = [line for line in lines if line is not None]
    if len(found) < len(raw):
        notes.append(f"{path.name}: {len(raw) - len(found):,} damaged lines skipped")
    return found


def _parse_object(raw: bytes) -> dict[str, Any] | None:
    try:
        line = orjson.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _phases(plan: Mapping[str, Any], notes: list[str]) -> tuple[PhaseRecord, ...]:
    try:
        phases = tuple(
            PhaseRecord(str(phase["name"]), phase["first_step"], phase["last_step"], number(phase.get("tokens")))
            for phase in plan.get("phases", ())
        )
        if all(0 < phase.first_step <= phase.last_step for phase in phases):
            return phases
    except (KeyError, TypeError, AttributeError):
        pass
    notes.append(f"{layout.PLAN_FILE}: its phases are damaged and skipped")
    return ()


def _schedule(plan: Mapping[str, Any]) -> Schedule | None:
    """Return the schedule of the plan; None for one of another version or with values that are no numbers."""
    try:
        schedule = Schedule(**as_mapping(plan.get("schedule")))
        schedule.rate(1)
    except (TypeError, ValueError, ZeroDivisionError, AttributeError, AssertionError):
        return None
    return schedule


def _read_checkpoint(path: Path, notes: list[str]) -> CheckpointRecord | None:
    """Return the newest checkpoint; its shards are not read."""
    manifest, state = path / layout.MANIFEST_FILE, path / layout.STATE_FILE
    try:
        content = orjson.loads(read_file(state))
        digest = hashlib.sha256(read_file(manifest)).hexdigest()
    except (OSError, ValueError) as error:
        notes.append(f"checkpoint {path.name}: its text files are missing or damaged ({error})")
        return None
    return CheckpointRecord(path.name, digest, as_mapping(content))


def unequal_measurements(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield a sentence per task of which a report compares scores on different documents or prompts.

    All files and lines of the first run count, and of the other runs the newest, whose scores stand beside it.

    Args:
        runs: the run of the report, and those that it is compared with.
    """
    run, *others = runs
    compared = {task: list(by_step.values()) for task, by_step in run.measured_tasks.items()}
    for other in others:
        last_step = max(other.evaluations, default=0)
        for task, by_step in other.measured_tasks.items():
            if (newest := by_step.get(("raw", last_step))) is not None:
                compared.setdefault(task, []).append(replace(newest, file=f"{other.title}: {newest.file}"))
    for task, found in compared.items():
        by_kind: dict[tuple[Any, ...], list[Measurement]] = {}
        for one in found:
            by_kind.setdefault((one.digest, one.documents, one.num_fewshot), []).append(one)
        kinds = [*by_kind.values()]
        if any(first[0].differs_from(second[0]) for first, second in combinations(kinds, 2)):
            yield f"{task}: not measured on the same documents and prompts: {_list(kinds)}"


def _list(kinds: Sequence[Sequence[Measurement]]) -> str:
    """Return the kinds of measurements with their files, and with digests if numbers do not tell them apart."""
    numbers = [same[0].describe(with_digest=False) for same in kinds]
    with_digest = len(set(numbers)) < len(numbers)
    texts = []
    for same in kinds[:_MAX_KINDS]:
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        texts.append(f"{same[0].file}{more} ({same[0].describe(with_digest=with_digest) or 'unknown'})")
    rest = len(kinds) - _MAX_KINDS
    return "; ".join(texts) + (f"; and {rest} more" if rest > 0 else "")
