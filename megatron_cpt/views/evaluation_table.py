"""Table of an evaluation's results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO, Any

from rich import box
from rich.table import Table
from rich.text import Text

from megatron_cpt.config import format_number_of
from megatron_cpt.views.plan_table import print_parts

_FIRST_METRIC = "bits_per_byte"  # at small scale accuracies are noise
_STANDARD_ERROR = "_stderr"


def render_evaluation(evaluation: Mapping[str, Any], stream: IO[str]) -> None:
    """Write the results of an evaluation to a stream.

    Args:
        evaluation: content of results.json.
    """
    model, requests = evaluation["model"], evaluation["requests"]
    step = f", step {model['step']:,}" if model["step"] is not None else ""
    head = f"{model['path']}{step}: {format_number_of(requests['total'], 'request')}"
    if requests["answered_from_cache"]:
        head += f", {requests['answered_from_cache']:,} of them answered from earlier evaluations"
    parts: list[Any] = [Text(head), _table(evaluation)]
    if requests["truncated"]:
        parts.append(
            Text(
                f"note: {format_number_of(requests['truncated'], 'prompt')} longer than the model's "
                f"{evaluation['config']['max_length']:,} tokens lost their beginning"
            )
        )
    print_parts(stream, parts)


def rows_of_metrics(metrics: Mapping[str, float | None]) -> Iterator[tuple[str, float | None, float | None]]:
    """Yield each metric of a task with its value and standard error, bits per byte first.

    Example:
        >>> list(rows_of_metrics({"acc": 0.5, "acc_stderr": 0.1, "f1,strict": 0.2, "f1_stderr,strict": 0.3}))
        [('acc', 0.5, 0.1), ('f1,strict', 0.2, 0.3)]
    """
    names = [name for name in metrics if not name.partition(",")[0].endswith(_STANDARD_ERROR)]
    for name in sorted(names, key=lambda name: not name.startswith(_FIRST_METRIC)):
        metric, comma, filter_name = name.partition(",")
        yield name, metrics[name], metrics.get(f"{metric}{_STANDARD_ERROR}{comma}{filter_name}")


def _table(evaluation: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for header in ("task", "metric", "value", "standard error", "better", "documents", "few-shot"):
        table.add_column(header, justify="left" if header in ("task", "metric") else "right", overflow="fold")
    for task, metrics in evaluation["results"].items():
        facts = evaluation["tasks"].get(task) or _group_facts(evaluation, task)
        title = task
        for name, value, error in rows_of_metrics(metrics):
            direction = facts.get("higher_is_better", {}).get(name.partition(",")[0])
            table.add_row(
                title,
                name,
                _number(value),
                "" if error is None else f"± {_number(error)}",
                "" if direction is None else ("higher" if direction else "lower"),
                *_counts(facts, sum(name in evaluation["results"].get(child, {}) for child in facts.get("tasks", ()))),
            )
            title = ""
    return table


def _counts(facts: Mapping[str, Any], num_tasks: int) -> tuple[str, str]:
    """Return documents and few-shot examples; of a group, of how many tasks its value is the mean."""
    if "documents" in facts:
        return f"{facts['documents']:,} of {facts['of_documents']:,}", str(facts["num_fewshot"])
    return f"mean of {format_number_of(num_tasks, 'task')}" if num_tasks else "", ""


def _group_facts(evaluation: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Return the tasks of a group, and which of their metrics are better when higher."""
    names = evaluation["groups"].get(group, [])
    known = [evaluation["tasks"].get(name) or _group_facts(evaluation, name) for name in names]
    directions: dict[str, bool] = {}
    for facts in known:
        directions |= facts["higher_is_better"]
    return {"tasks": names, "higher_is_better": directions}


def _number(value: float | None) -> str:
    if value is None:
        return "NaN"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
