"""Files of `evaluate` in a run directory: results of checkpoints of the run, or of the one that it started from."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import WeightSet, read_saved_run
from megatron_cpt.config import format_number_of
from megatron_cpt.errors import CptError
from megatron_cpt.files.whole_io import read_file
from megatron_cpt.report.metrics_columns import (
    Directions,
    Results,
    as_mapping,
    clean_directions,
    clean_results,
    is_step,
)

RESULTS_FOLDER = "evaluations"
_KNOWN_JSON = (layout.PLAN_FILE, "lock.json")
_CHECKPOINT_STEP = re.compile(r"step-(\d{8,18})(?!\d)")


def find_results(run_directory: Path) -> list[Path]:
    """Return the JSON files that may hold results."""
    own = [path for path in sorted(run_directory.glob("*.json")) if path.name not in _KNOWN_JSON]
    return [*own, *sorted((run_directory / RESULTS_FOLDER).glob("**/*.json"))]


@dataclass(frozen=True)
class Measurement:
    """Documents and prompts of a task in one result file, or line of metrics.jsonl; None: it does not say it.

    Attributes:
        digest: of documents and prompts.
        num_fewshot: examples in each prompt.
    """

    file: str
    digest: str | None
    documents: int | None
    num_fewshot: int | None

    def differs_from(self, other: Measurement) -> bool:
        """Return whether both are known to be of different documents or prompts."""
        if self.digest is not None and other.digest is not None:
            return self.digest != other.digest
        pairs = ((self.documents, other.documents), (self.num_fewshot, other.num_fewshot))
        return any(one is not None and two is not None and one != two for one, two in pairs)

    def describe(self, *, with_digest: bool) -> str:
        """Return the numbers as text: "4 documents, 2 few-shot examples"."""
        parts = []
        if self.documents is not None:
            parts.append(format_number_of(self.documents, "document"))
        if self.num_fewshot is not None:
            parts.append(format_number_of(self.num_fewshot, "few-shot example"))
        if with_digest and self.digest is not None:
            parts.append(f"digest {self.digest.removeprefix('sha256:')[:8]}")
        return ", ".join(parts)


MeasuredTasks = Mapping[str, Mapping[tuple[WeightSet, int], Measurement]]
"""Measurements by task, and by weights and step."""


class ResultFiles:
    """Results of `evaluate` that belong to a run.

    Args:
        run_directory: with the files, and the checkpoints that they are compared with.
        config: the resolved run.yaml.
        last_step: step of results that name none.
        notes: list to which is added what a reader of the results must know.

    Attributes:
        measured_tasks: documents and prompts of the results, after `add_to`.
    """

    def __init__(self, run_directory: Path, config: Mapping[str, Any], last_step: int, notes: list[str]) -> None:
        self._folder, self._config, self._last_step, self._notes = run_directory, config, last_step, notes
        self.measured_tasks: dict[str, dict[tuple[WeightSet, int], Measurement]] = {}
        self._origins: dict[tuple[WeightSet, int, str], str] = {}
        self._digest = functools.cache(_digest)  # of each checkpoint once

    def add_to(self, evaluations: Mapping[WeightSet, dict[int, Results]]) -> Directions:
        """Add all results by their weights and step, and return which metrics are better when higher."""
        directions: Directions = {}
        for path in find_results(self._folder):
            directions |= self._add(path, evaluations)
        return directions

    def note_measurements(self, file: str, weights: WeightSet, step: int, tasks: Mapping[str, Any]) -> None:
        """Remember with which documents and prompts tasks were measured; of one step, the last file counts.

        Args:
            tasks: by task, its facts as `evaluate` writes them.
        """
        for task, facts in tasks.items():
            self.measured_tasks.setdefault(task, {})[weights, step] = _measurement(file, as_mapping(facts))

    def _add(self, path: Path, evaluations: Mapping[WeightSet, dict[int, Results]]) -> Directions:
        """Add a file. Another program's JSON file is no concern of the report."""
        name = path.name
        try:
            content = orjson.loads(read_file(path))
        except (OSError, ValueError) as error:
            self._notes.append(f"{name}: missing or damaged, skipped ({error})")
            return {}
        if not isinstance(content, dict) or "results" not in content:
            return {}
        results = clean_results(content["results"])
        if not results:
            self._notes.append(f"{name}: no results in it, skipped")
            return {}
        weights: WeightSet = "ema" if as_mapping(content.get("model")).get("weights") == "ema" else "raw"
        step = self._step_of(name, content, weights)
        if step is None:
            return {}
        for task, metrics in results.items():
            first = self._origins.setdefault((weights, step, task), name)
            if first != name:
                self._notes.append(f"{name}: {task} of step {step:,} is also in {first}; {name} counts")
            by_task = evaluations[weights].setdefault(step, {})
            by_task[task] = by_task.get(task, {}) | metrics
        facts = as_mapping(content.get("tasks"))
        self.note_measurements(name, weights, step, {task: facts[task] for task in results if task in facts})
        return clean_directions({task: as_mapping(fact).get("higher_is_better") for task, fact in facts.items()})

    def _step_of(self, name: str, content: Mapping[str, Any], weights: WeightSet) -> int | None:
        """Return the step that results belong to; None, with a note: they are of another model."""
        step = _checkpoint_step(as_mapping(content.get("model")))
        digest = as_mapping(content.get("digests")).get("checkpoint")
        if digest is None and step is None:
            self._notes.append(
                f"{name}: does not name its checkpoint, so it counts for the last step, {self._last_step:,}"
            )
            return self._last_step
        if digest is None:
            return step
        step = step or 0  # an import may have any name
        origin = as_mapping(self._config.get("init")).get("from")
        if isinstance(origin, str) and self._digest(Path(origin), weights)[0] == digest:
            return 0
        own = layout.checkpoints_folder(self._folder) / layout.checkpoint_name(step)
        own_digest, problem = self._digest(own, weights)
        if own_digest == digest:
            return step
        if step == 0:
            return self._step_of_import(name, origin, weights)
        if own_digest is None and step > self._last_step:
            self._notes.append(f"{name}: is of step {step:,}, which this run has not reached, skipped")
            return None
        if own_digest is None:
            if own.exists():  # otherwise deleted since then
                self._notes.append(f"{name}: counts, but was not compared with {own.name} of this run: {problem}")
            return step
        self._notes.append(f"{name}: evaluates another model than {own.name} of this run, skipped")
        return None

    def _step_of_import(self, name: str, origin: Any, weights: WeightSet) -> int | None:
        """Return 0 for results of an import if nothing shows that the run started from another model."""
        if not isinstance(origin, str):
            if self._config:
                self._notes.append(f"{name}: evaluates an imported model, but this run has no init.from, skipped")
                return None
            problem = f"{layout.RUN_FILE} cannot be read"
        else:
            origin_digest, problem = self._digest(Path(origin), weights)
            if origin_digest is not None:
                self._notes.append(
                    f"{name}: evaluates another model than {origin}, from which this run started, skipped; if it is "
                    f"the same model, imported with other options, evaluate {origin}"
                )
                return None
        self._notes.append(
            f"{name}: counts as step 0, but was not compared with the checkpoint from which this run started: {problem}"
        )
        return 0


def _checkpoint_step(model: Mapping[str, Any]) -> int | None:
    """Return the step of the evaluated checkpoint; an imported one is step 0, before the run."""
    step = model.get("step")
    if is_step(step):
        return step
    found = _CHECKPOINT_STEP.search(str(model.get("checkpoint")))
    return int(found[1]) if found else None


def _digest(checkpoint: Path, weights: WeightSet) -> tuple[str | None, str]:
    """Return the digest of a checkpoint's weights, or of a run's newest one; None with a reason if it is unreadable."""
    try:
        return read_saved_run(layout.resolve_checkpoint(checkpoint)).weights_digest(weights), ""
    except (CptError, OSError) as error:
        return None, str(error)


def _measurement(file: str, facts: Mapping[str, Any]) -> Measurement:
    digest, documents, shots = facts.get("digest"), facts.get("documents"), facts.get("num_fewshot")
    return Measurement(
        file,
        digest if isinstance(digest, str) else None,
        documents if is_step(documents) else None,
        shots if is_step(shots) else None,
    )
