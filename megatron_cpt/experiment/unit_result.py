"""State of a run of an experiment on the disk: its run.yaml, changes since it started, and its result."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import orjson

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import read_json, read_run
from megatron_cpt.config import dump_yaml, format_count
from megatron_cpt.errors import CptError, RefusedError
from megatron_cpt.experiment.arms import Metric, Unit
from megatron_cpt.experiment.input_fingerprints import InputFingerprints, changed_inputs
from megatron_cpt.experiment.result_file import FORMAT_VERSION, RESULT_FILE, read_result_file
from megatron_cpt.files.atomic import sync_folder, write_atomically
from megatron_cpt.files.jsonl_log import write_errors_as_cpt_errors
from megatron_cpt.files.whole_io import exists
from megatron_cpt.report.metrics_columns import clean_directions
from megatron_cpt.report.run_digests import differences
from megatron_cpt.report.run_record import RunReader

_MOST_NAMED = 5


@dataclass(frozen=True)
class UnitResult:
    """Result of a finished run.

    Attributes:
        held_out: loss per held-out source after the last step, in nats per token; NaN if it is not a finite number.
        tasks: metrics per task after the last step.
        source_tokens: tokens per source that the run was planned with.
        higher_is_better: per task and metric, as far as the task says it.
        inputs: fingerprint per key of run.yaml that names files; see `InputFingerprints`.
    """

    steps: int
    held_out: Mapping[str, float]
    tasks: Mapping[str, Mapping[str, float]]
    source_tokens: Mapping[str, int]
    higher_is_better: Mapping[tuple[str, str], bool] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def value(self, metric: Metric, scales: Mapping[str, float]) -> float:
        """Return the value of a metric; NaN if the run has none.

        Args:
            scales: per held-out source the factor from nats per token to the unit of the experiment.
        """
        if metric.task is not None:
            task, name = metric.task
            found = self.tasks.get(task, {})
            return found.get(name, found.get(f"{name},none", math.nan))
        losses = [self.held_out.get(source, math.nan) * scales[source] for source in metric.sources]
        return math.fsum(losses) / len(losses)


def read_result(unit: Unit) -> UnitResult | None:
    """Return the result of a run; None if it is not finished.

    Raises:
        RefusedError: the file is damaged, or of a newer version.
    """
    path = unit.folder / RESULT_FILE
    if not exists(path):
        return None
    content = read_result_file(path)
    return UnitResult(
        steps=content.steps,
        held_out={name: math.nan if loss is None else loss for name, loss in content.held_out.items()},
        tasks={
            task: {name: math.nan if value is None else value for name, value in metrics.items()}
            for task, metrics in content.tasks.items()
        },
        source_tokens=content.source_tokens,
        higher_is_better=clean_directions(content.higher_is_better),
        inputs=content.inputs,
    )


def is_started(unit: Unit) -> bool:
    """Return whether the run has a run.yaml of its own."""
    return exists(unit.folder / layout.RUN_FILE)


def _read_inputs(unit: Unit) -> dict[str, str]:
    """Return the fingerprints from the start of a run; empty if they are unknown."""
    if not exists(unit.inputs_file):
        return {}
    content = read_json(unit.inputs_file)
    if not all(isinstance(value, str) for value in content.values()):
        raise RefusedError(
            f"{unit.inputs_file}: damaged: not a fingerprint per name; restore it, or remove the run's folder to train "
            "it again"
        )
    return content


def changes_since_start(unit: Unit, fingerprints: InputFingerprints) -> list[str]:
    """Return what differs between a run on the disk and what the arm would be now; empty for a run not started.

    Args:
        fingerprints: of the present files; one object for all runs reads each file once.
    """
    path = unit.folder / layout.RUN_FILE
    if not is_started(unit):
        return [f"{path} is missing"] if exists(unit.folder / RESULT_FILE) else []
    try:
        before = read_run(unit.folder)
    except RefusedError as error:  # a change, so that --restart-changed can set the run aside
        return [f"{path} is damaged ({str(error).removeprefix(f'damaged: {path}: ').partition('; give the path')[0]})"]
    found = differences([before, unit.config.to_dict()])
    changes = [f"{key} was {old}, is {new}" for key, (old, new) in found.items()]
    result = read_result(unit)
    for name, tokens in unit.source_tokens.items() if result else ():
        earlier = result.source_tokens.get(name) if result else None
        if earlier is not None and earlier != tokens:
            changes.append(f"source {name} had {format_count(earlier)} tokens, has {format_count(tokens)}")
    inputs = _read_inputs(unit) if result is None else result.inputs
    replaced = changed_inputs(inputs, fingerprints.of_run(unit.config))
    return [*changes, *(f"{key}: its files were replaced by others" for key in replaced)]


def refuse_changes(changed: Mapping[str, list[str]]) -> None:
    """Raise RefusedError for runs that were trained with other settings; see `changes_since_start`."""
    if not changed:
        return
    lines = []
    for name, changes in changed.items():
        more = f"; {len(changes) - _MOST_NAMED} more" if len(changes) > _MOST_NAMED else ""
        lines.append(f"  - {name}: {'; '.join(changes[:_MOST_NAMED])}{more}")
    raise RefusedError(
        "\n".join(
            [
                f"{len(changed)} of the runs on the disk were trained with other settings or files; restore them, "
                "choose another output, or train these runs again with --restart-changed:",
                *lines,
            ]
        )
    )


def set_run_aside(unit: Unit) -> str:
    """Rename the run directory, so that the run starts from scratch; return the new name."""
    aside = next(
        path for n in count(1) if not (path := unit.folder.with_name(f"{unit.folder.name}.before-{n}")).exists()
    )
    with write_errors_as_cpt_errors(unit.folder):
        os.rename(unit.folder, aside)
        sync_folder(aside.parent)
    return str(aside)


def write_run_file(unit: Unit) -> None:
    """Write the run.yaml that `train` is started with, and before the first start the fingerprints of its files."""
    with write_errors_as_cpt_errors(unit.run_file):
        unit.folder.parent.mkdir(parents=True, exist_ok=True)
        if not is_started(unit):
            write_atomically(unit.inputs_file, orjson.dumps(InputFingerprints().of_run(unit.config)))
        write_atomically(unit.run_file, dump_yaml(unit.config.to_dict()))


def finish_unit(unit: Unit, *, keep_checkpoints: bool) -> UnitResult:
    """Write the result of a run that `train` has ended, then remove its checkpoints unless they are kept.

    Raises:
        RefusedError: files that the run reads were replaced since its start.
        CptError: the run has no held-out losses of its last step, or the result cannot be written.
    """
    inputs = _read_inputs(unit)
    if replaced := changed_inputs(inputs, InputFingerprints().of_run(unit.config)):
        raise RefusedError(
            f"{', '.join(replaced)}: files were replaced by others while the run trained, so it cannot be compared; "
            "restore them and run the experiment again, or train the run again with --restart-changed"
        )
    record = RunReader(unit.folder).read()
    held_out = record.metrics.validations.get(unit.plan.steps, {})
    validation = unit.config.validation
    missing = [name for name in (validation.sources if validation else ()) if name not in held_out]
    if missing and not held_out:
        raise CptError(f"{unit.folder}: metrics.jsonl has no held-out losses of the last step, {unit.plan.steps:,}")
    result = UnitResult(
        steps=unit.plan.steps,
        held_out={**held_out, **dict.fromkeys(missing, math.nan)},
        tasks=record.evaluations.get(unit.plan.steps, {}),
        source_tokens=dict(unit.source_tokens),
        higher_is_better=record.higher_is_better,
        inputs=inputs,
    )
    with write_errors_as_cpt_errors(unit.folder / RESULT_FILE):
        write_atomically(unit.folder / RESULT_FILE, orjson.dumps(_plain(result), option=orjson.OPT_INDENT_2))
        checkpoints = layout.checkpoints_folder(unit.folder)
        if not keep_checkpoints and checkpoints.is_dir():
            shutil.rmtree(checkpoints)
    return result


def _plain(result: UnitResult) -> dict[str, Any]:
    directions: dict[str, dict[str, bool]] = {}
    for (task, metric), is_higher in result.higher_is_better.items():
        directions.setdefault(task, {})[metric] = is_higher
    return {
        "format": "megatron-cpt experiment run",
        "format_version": FORMAT_VERSION,
        "steps": result.steps,
        "held_out": {name: loss if math.isfinite(loss) else None for name, loss in result.held_out.items()},
        "tasks": {task: dict(metrics) for task, metrics in result.tasks.items()},
        "source_tokens": dict(result.source_tokens),
        "higher_is_better": directions,
        "inputs": dict(result.inputs),
    }
