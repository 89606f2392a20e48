"""Areas in which a model is weak, from an evaluation: QA data of these areas gets more weight.

The factor of a QA source is its error divided by the mean error over all areas. The error is 1 - accuracy, the mean
over the tasks of the area, and at least 0.01. A source without an area has the factor 1.

Example: accuracies of 0.30 (STEM) and 0.60 (chat) are errors of 0.70 and 0.40, on average 0.55. So the tokens of STEM
count 1.27 times and the tokens of chat 0.73 times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.record import read_json
from megatron_cpt.errors import RefusedError, UserError

# Names of lm-eval's accuracies, by preference: acc_norm corrects for the length of the answers.
_ACCURACIES = ("acc_norm", "acc", "exact_match", "pass@1", "pass_at_1", "em")
_LEAST_ERROR = 0.01  # a perfect score must not remove a source


@dataclass(frozen=True)
class WeakArea:
    """Area of one QA source.

    Attributes:
        accuracies: accuracy per task.
        factor: multiplier of the source's tokens.
    """

    accuracies: Mapping[str, float]
    factor: float

    @property
    def error(self) -> float:
        """Mean of 1 - accuracy over the tasks, at least 0.01."""
        return max(_LEAST_ERROR, 1.0 - math.fsum(self.accuracies.values()) / len(self.accuracies))


def find_weak_areas(evaluation: Path, areas: Mapping[str, Sequence[str]]) -> dict[str, WeakArea]:
    """Return the area of each QA source that has tasks.

    Args:
        evaluation: results.json of `megatron-cpt evaluate`.
        areas: tasks per QA source; at least one source with at least one task.

    Raises:
        UserError: the file does not exist, or a task is not in it or has no accuracy.
        RefusedError: the file is damaged.
    """
    if not evaluation.is_file():
        raise UserError(f"--evaluation {evaluation}: no such file; give the output of `megatron-cpt evaluate`")
    results = read_json(evaluation).get("results")
    if not isinstance(results, dict):
        raise RefusedError(f"{evaluation}: has no results; give the output of `megatron-cpt evaluate`")
    accuracies = {
        source: {task: _accuracy(results, task, evaluation) for task in tasks} for source, tasks in areas.items()
    }
    errors = {source: WeakArea(scores, 1.0).error for source, scores in accuracies.items()}
    mean = math.fsum(errors.values()) / len(errors)
    return {source: WeakArea(scores, errors[source] / mean) for source, scores in accuracies.items()}


def _accuracy(results: Mapping[str, Any], task: str, evaluation: Path) -> float:
    metrics = results.get(task)
    if not isinstance(metrics, dict):
        known = ", ".join(list(results)[:12])
        raise UserError(f"--area {task}: not among the results of {evaluation}; choose one of {known}")
    by_name = {name.partition(",")[0]: value for name, value in reversed(metrics.items())}
    for name in _ACCURACIES:
        value = by_name.get(name)
        if isinstance(value, int | float) and 0.0 <= value <= 1.0:
            return float(value)
    raise UserError(
        f"--area {task}: {evaluation} has no accuracy of it ({', '.join(_ACCURACIES)}), only {', '.join(by_name)}; "
        "choose another task"
    )
