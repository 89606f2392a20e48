"""Finished runs as points to fit: path and held-out losses of each; runs that do not belong together are refused."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.checkpoint.layout import resolve_checkpoint
from megatron_cpt.config import format_number_of
from megatron_cpt.errors import ConfigError, RefusedError, UserError
from megatron_cpt.law.run_path import Floats, RunPath, path_of_plan
from megatron_cpt.provenance.run_history import MALFORMED
from megatron_cpt.report.metrics_columns import as_mapping
from megatron_cpt.report.run_record import RunReader, RunRecord

MIN_ARMS = 4
_MIN_POINTS = 3  # validations of a run after step 0
_LOSSES = (1e-6, 1e6)  # nats per token; a loss outside is no measurement, and its logarithm would dominate the fit
_START_TOLERANCE = 1e-3  # relative difference of the losses of equal weights at another layout or precision
_COMPARED = ("model", "tokenizer", "seq_length", "batch.global", "documents", "optimizer", "init.load")
_TRUNK = ("init.from", "validation.sources", "validation.batches")


@dataclass(frozen=True)
class FinishedRun:
    """Held-out losses of a run.

    Attributes:
        folder: the run directory.
        config: its resolved run.yaml.
        path: its path, with knots at `steps`.
        planned: the same path without knots at `steps`, equal for all runs of an arm.
        start: held-out loss per source before the first step.
        steps: validated steps after it.
        losses: held-out loss per source at `steps`; NaN: not measured or not usable.
        notes: what was skipped.
    """

    folder: str
    config: Mapping[str, Any]
    path: RunPath
    planned: RunPath
    start: Mapping[str, float]
    steps: npt.NDArray[np.int64]
    losses: Mapping[str, Floats]
    notes: tuple[str, ...]


def read_finished_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Read run directories that started from the same trunk and are validated on the same data.

    Raises:
        UserError: a folder is no run, or the runs are of too few arms.
        ConfigError: lists the problems of all runs: no validation, too few points, another model, tokenizer or trunk.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run directory is given twice; give each once, because its points would count double")
    problems: list[str] = []
    runs: list[FinishedRun] = []
    for folder in folders:
        try:
            runs.append(read_finished_run(folder))
        except UserError as error:
            problems.append(str(error))
    problems += _renamed_sources(runs)
    for run in runs[1:]:
        problems += [f"{run.folder}: {difference}" for difference in _differences(runs[0], run)]
    if problems:
        raise ConfigError("runs to fit", problems)
    if (num_arms := len(arms_of(runs))) < MIN_ARMS:
        raise UserError(
            f"{format_number_of(len(runs), 'run')} of {format_number_of(num_arms, 'arm')} to fit; give at least "
            f"{MIN_ARMS} arms, with different blends and learning rates: the error of a prediction comes from omitting "
            "all runs of one arm at a time. Runs with equal plans are one arm, whatever their seed"
        )
    return runs


def arms_of(runs: Sequence[FinishedRun]) -> list[list[int]]:
    """Return the indices of the runs of each arm: runs with equal plans, whatever their seed, name or output."""
    arms: list[list[int]] = []
    for index, run in enumerate(runs):
        arm = next((arm for arm in arms if runs[arm[0]].planned.equals(run.planned)), None)
        if arm is None:
            arms.append([index])
        else:
            arm.append(index)
    return arms


def read_finished_run(folder: Path) -> FinishedRun:
    """Read one run directory.

    Raises:
        UserError: it is no run, has no usable plan, or too few validations.
    """
    record = RunReader(folder).read()
    if not record.config or not record.plan:
        raise UserError(f"{folder}: its run.yaml or plan.json is missing or damaged; restore it, or omit the run")
    _check_one_plan(record)
    validations = record.metrics.validations
    if 0 not in validations:
        raise UserError(
            f"{folder}: no held-out loss before the first step in metrics.jsonl; `validation` in run.yaml measures it. "
            "Omit the run"
        )
    start = {name: loss for name, loss in validations[0].items() if _LOSSES[0] <= loss <= _LOSSES[1]}
    if not start:
        raise UserError(f"{folder}: no usable held-out loss before the first step; omit the run")
    notes = [note for note in record.notes if "metrics.jsonl" in note]
    steps, losses, skipped = _points(validations, start)
    if skipped:
        notes.append(f"{skipped:,} held-out losses are not between {_LOSSES[0]:g} and {_LOSSES[1]:g} and skipped")
    if len(steps) < _MIN_POINTS:
        raise UserError(
            f"{folder}: {len(steps)} validations after the start, at least {_MIN_POINTS} are needed; "
            "lower validation.every, or omit the run"
        )
    if record.planned_steps is not None and steps[-1] > record.planned_steps:
        raise UserError(
            f"{folder}/metrics.jsonl: has held-out losses after step {steps[-1]:,}, but plan.json ends with step "
            f"{record.planned_steps:,}: one of the files belongs to another run; restore it, or omit the run"
        )
    try:
        with np.errstate(all="ignore"):  # of a damaged plan
            path, planned = path_of_plan(record.plan, at=steps.tolist()), path_of_plan(record.plan)
        path.knots_at(steps.tolist())
        if not 0 < path.areas[-1] < math.inf:
            raise ValueError("no learning rate")
    except (*MALFORMED, StopIteration, AssertionError) as error:
        raise UserError(f"{folder}/plan.json: damaged ({error!r}); restore it, or omit the run") from error
    return FinishedRun(str(folder), record.config, path, planned, start, steps, losses, tuple(notes))


def _points(
    validations: Mapping[int, Mapping[str, float]], start: Iterable[str]
) -> tuple[npt.NDArray[np.int64], dict[str, Floats], int]:
    """Return the validated steps with any usable loss, the losses per source, and how many are not usable."""
    steps = [step for step in sorted(validations) if step > 0]
    found = {name: np.array([validations[step].get(name, math.nan) for step in steps]) for name in start}
    usable = {name: (values >= _LOSSES[0]) & (values <= _LOSSES[1]) for name, values in found.items()}
    skipped = sum(int(np.count_nonzero(~mask)) for mask in usable.values())
    kept = np.logical_or.reduce(list(usable.values())) if steps else np.zeros(0, dtype=bool)
    losses = {name: np.where(usable[name], values, math.nan)[kept] for name, values in found.items()}
    return np.array(steps, dtype=np.int64)[kept], losses, skipped


def _check_one_plan(record: RunRecord) -> None:
    """Refuse a run that has changed its blend or schedule: plan.json describes only the last part of it."""
    followed = {
        repr((as_plain(line.get("plan"), "phases"), as_plain(line.get("run"), "schedule"))) for line in record.plans
    }
    if len(followed) > 1:
        raise UserError(
            f"{record.folder}: blend or schedule changed while it ran (plans.jsonl has {len(followed)} plans), so its "
            "losses belong to no single plan; omit the run"
        )


def as_plain(section: Any, key: str) -> Any:
    """Return a value of a section by its dotted key; None if it is missing."""
    for part in key.split("."):
        section = section.get(part) if isinstance(section, Mapping) else None
    return section


def compared_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a run.yaml that a law holds for, by dotted key; not the name of the model's preset."""
    values = {key: as_plain(config, key) for key in _COMPARED}
    if isinstance(values["model"], Mapping):
        values["model"] = {name: value for name, value in values["model"].items() if name != "preset"}
    return values


def data_paths(config: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return the paths of a run.yaml: per training source (`sources`) and held-out source (`validation.sources`)."""
    named = {
        "sources": {name: as_plain(source, "path") for name, source in _mapping(config, "sources").items()},
        "validation.sources": _mapping(config, "validation.sources"),
    }
    return {
        key: {name: list(map(str, paths)) if isinstance(paths, list) else [str(paths)] for name, paths in one.items()}
        for key, one in named.items()
    }


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return as_mapping(as_plain(config, key))


def are_same_paths(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether paths name the same files in the same order, relative or absolute."""
    return list(map(os.path.realpath, one)) == list(map(os.path.realpath, other))


def trunk_key(name: Any) -> str:
    """Return the checkpoint that an `init.from` names, so that a run and its newest checkpoint compare equal.

    A folder that does not exist here stays text.
    """
    path = Path(str(name))
    try:
        if not path.exists():
            return str(name)
        return str(resolve_checkpoint(path).resolve())
    except RefusedError:  # a folder without a checkpoint
        return str(path.resolve())
    except OSError:
        return str(name)


def _trunk_values(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: as_plain(config, key) for key in _TRUNK}


def _differences(first: FinishedRun, run: FinishedRun) -> Iterator[str]:
    """Yield what keeps a run from being fitted together with the first one."""
    own, theirs = ({**compared_values(one.config), **_trunk_values(one.config)} for one in (run, first))
    for key, one in own.items():
        other = theirs[key]
        is_same = trunk_key(one) == trunk_key(other) if key == "init.from" else one == other
        if not is_same:
            yield f"{key} is {_short(one)}, but {first.folder} has {_short(other)}; fit them separately"
    for name, loss in first.start.items():
        other = run.start.get(name, math.nan)
        if not abs(other - loss) <= _START_TOLERANCE * loss:
            yield (
                f"the loss of {name} before the first step is {other:.4f}, in {first.folder} {loss:.4f}: "
                "another trunk or other held-out data; fit them separately"
            )
            return


def _renamed_sources(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """Yield the training sources that have other paths in one run than in an earlier one."""
    known: dict[str, tuple[FinishedRun, list[str]]] = {}
    for run in runs:
        paths = data_paths(run.config)["sources"]
        for name in run.path.sources:
            earlier, other = known.setdefault(name, (run, paths.get(name, [])))
            if not are_same_paths(paths.get(name, []), other):
                yield (
                    f"{run.folder}: sources.{name}.path is {_short(paths.get(name, []))}, but {earlier.folder} has "
                    f"{_short(other)}: rename one of the sources"
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
