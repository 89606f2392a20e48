"""Learning against forgetting: held-out losses and tasks before the run, at each switch of phase, and at the end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_cpt.report.page import (
    MISSING,
    ChangeChart,
    Curve,
    CurveChart,
    DataTable,
    PageSection,
    decimal,
    finite,
    signed,
)
from megatron_cpt.report.run_record import RunRecord

MAX_CURVES = 12
"""Curves of a chart: as many as six colors and four kinds of dashes tell apart."""

MAX_ROWS = 200
_SAME = 0.0005  # nats per token below which a held-out loss has not changed
_LOWER_IS_BETTER = ("bits_per_byte", "perplexity", "loss", "bpb", "nll", "error", "brier")  # where no file says it
_CERTAIN = 2.0  # standard errors from which a change of a task counts
_ERROR_UNKNOWN = ", error unknown"


@dataclass(frozen=True)
class Stage:
    """Moment of a run that its measurements are compared at: its step and its name."""

    step: int
    name: str

    @property
    def header(self) -> str:
        """Title of its column."""
        return f"{self.name} (step {self.step:,})"


def stages(run: RunRecord, measured: Collection[int]) -> list[Stage]:
    """Return the moments before the run, at each switch of phase and at the end, as far as they were measured.

    The measurement of a switch is the last one of the phase that ends there. Example: measured at steps 0, 60, 120 and
    171 with a switch after step 122, the moments are the steps 0, 120 and 171.
    """
    steps = sorted(measured)
    if not steps:
        return []
    found = [Stage(steps[0], "before" if steps[0] == 0 else "first")]
    for last_step, following in run.switches:
        until = [step for step in steps if found[-1].step < step <= last_step]
        if until and steps[-1] > last_step:
            found.append(Stage(until[-1], f"switch to {following}"))
    if steps[-1] > found[-1].step:
        is_end = run.planned_steps is None or steps[-1] >= run.planned_steps
        found.append(Stage(steps[-1], "end" if is_end else "now"))
    return found


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss of one source at the stages of a run; None: not measured."""

    source: str
    losses: tuple[float | None, ...]

    @property
    def change(self) -> float | None:
        """Change from the first stage to the last."""
        first, last = self.losses[0], self.losses[-1]
        return last - first if len(self.losses) > 1 and first is not None and last is not None else None

    @property
    def verdict(self) -> str:
        """Word for the change."""
        if self.change is None:
            return ""
        return "same" if abs(self.change) < _SAME else "learned" if self.change < 0 else "forgot"


def held_out(run: RunRecord, *, of_average: bool = False) -> tuple[list[Stage], list[HeldOut]]:
    """Return the stages of a run and the held-out losses of each source at them.

    Args:
        run: the run.
        of_average: losses of the moving average of the weights.
    """
    losses = run.metrics.validations_ema if of_average else run.metrics.validations
    at = stages(run, losses)
    names = dict.fromkeys(name for stage in at for name in losses[stage.step])
    return at, [HeldOut(name, tuple(_known(losses[stage.step].get(name)) for stage in at)) for name in names]


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task at the stages of a run, with standard errors; None: not measured."""

    task: str
    metric: str
    values: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    is_lower_better: bool

    @property
    def change(self) -> float | None:
        """Change from the first measured stage to the last."""
        known = [value for value in self.values if value is not None]
        return known[-1] - known[0] if len(known) > 1 else None

    @property
    def change_error(self) -> float | None:
        """Standard error of the change, as if both were measured on different questions, which is cautious."""
        pairs = zip(self.values, self.errors, strict=True)
        known = [error for value, error in pairs if value is not None]
        if len(known) < 2 or known[0] is None or known[-1] is None:
            return None
        return math.hypot(known[0], known[-1])

    @property
    def verdict(self) -> str:
        """Word for the change: within the error, better or worse."""
        if self.change is None:
            return ""
        if self.change == 0:
            return "same"
        word = "better" if (self.change < 0) == self.is_lower_better else "worse"
        if self.change_error is None:
            return word + _ERROR_UNKNOWN
        return "within error" if abs(self.change) < _CERTAIN * self.change_error else word


def task_scores(run: RunRecord, *, of_average: bool = False) -> tuple[list[Stage], list[TaskScore]]:
    """Return the stages of a run and the metrics of each task at them; bits per byte come first.

    Args:
        run: the run.
        of_average: metrics of the moving average of the weights.
    """
    evaluations = run.evaluations_ema if of_average else run.evaluations
    at = stages(run, evaluations)
    results = [evaluations[stage.step] for stage in at]
    keys = dict.fromkeys(
        (task, metric)
        for one in results
        for task, metrics in one.items()
        for metric in metrics
        if not _is_error(metric)
    )
    scores = []
    lower = {key: is_lower_better(*key, run.higher_is_better) for key in keys}
    for task, metric in sorted(keys, key=lambda key: (key[0], not lower[key])):
        values = tuple(one.get(task, {}).get(metric) for one in results)
        errors = tuple(one.get(task, {}).get(error_name(metric)) for one in results)
        scores.append(TaskScore(task, metric, values, errors, lower[task, metric]))
    return at, scores


def is_lower_better(task: str, metric: str, higher_is_better: Mapping[tuple[str, str], bool]) -> bool:
    """Return whether a smaller value of a metric is better: what the task says, else what the metric's name says."""
    is_higher = higher_is_better.get((task, metric.partition(",")[0]))
    return any(word in metric.lower() for word in _LOWER_IS_BETTER) if is_higher is None else not is_higher


def error_name(metric: str) -> str:
    """Return the name of a metric's standard error, as lm-eval writes it: `acc,none` has `acc_stderr,none`."""
    name, comma, rule = metric.partition(",")
    return f"{name}_stderr{comma}{rule}"


def _is_error(metric: str) -> bool:
    return metric.partition(",")[0].endswith("_stderr")


def learning_section(run: RunRecord, others: Sequence[RunRecord], *, num_unequal: int) -> PageSection:
    """Return the section with the held-out losses and the tasks.

    Args:
        num_unequal: tasks that were not measured on the same documents and prompts.
    """
    parts = [*_held_out_parts(run, others), *_task_parts(run, others, num_unequal), *_average_parts(run)]
    sentences = ["Held-out loss in nats per token: lower is better."]
    if any(one.evaluations for one in (run, *others)) or run.evaluations_ema:
        sentences[0] += " ± is one standard error."
    if not parts:
        sentences = [
            "Nothing was measured on held-out data. Add a `validation` section to run.yaml, or run "
            f"`megatron-cpt evaluate {run.folder} --tasks ...`."
        ]
    return PageSection("learning", "Learning against forgetting", sentences, parts)


def _held_out_parts(run: RunRecord, others: Sequence[RunRecord]) -> Iterator[DataTable | CurveChart | ChangeChart]:
    at, rows = held_out(run)
    if not rows:
        return
    changed = [row for row in rows if row.change is not None]
    if changed:
        by_run = {run.title: [finite(row.change) for row in rows[:MAX_ROWS]]}
        for other in others:
            changes = {row.source: row.change for row in held_out(other)[1]}
            by_run[other.title] = [finite(changes.get(row.source)) for row in rows[:MAX_ROWS]]
        most = min(changed, key=lambda row: row.change or 0.0)
        yield ChangeChart(
            "held-out-change",
            "Change of the held-out loss",
            "nats per token; left of zero is better",
            f"{len(changed)} sources; the largest gain is {signed(most.change)} on {most.source}.",
            [row.source for row in rows[:MAX_ROWS]],
            by_run,
        )
    yield _held_out_table(run, others, at, rows)
    if len(run.metrics.validations) > 1:
        steps = sorted(run.metrics.validations)
        shown = rows[:MAX_CURVES]
        yield CurveChart(
            "held-out-loss",
            f"Held-out loss by source{f' ({run.title})' if others else ''}",
            "nats per token",
            f"{len(shown)} sources, measured {len(steps)} times.",
            steps,
            [
                Curve(row.source, [finite(run.metrics.validations[step].get(row.source)) for step in steps])
                for row in shown
            ],
            run.switches,
            has_points=len(steps) <= 60,
        )


def _held_out_table(
    run: RunRecord, others: Sequence[RunRecord], at: Sequence[Stage], rows: Sequence[HeldOut]
) -> DataTable:
    theirs = {other.title: {row.source: row for row in held_out(other)[1]} for other in others}
    headers = ["held-out source", *(stage.header for stage in at), "change", "in percent", "result"]
    for name in theirs:
        headers += [f"{name}: end", "this run − that"]
    lines = [_held_out_line(row, theirs) for row in rows[:MAX_ROWS]]
    complete = [row for row in rows if None not in row.losses]
    if len(complete) > 1:
        mean = HeldOut("mean", tuple(_mean(losses) for losses in zip(*(row.losses for row in complete), strict=True)))
        means = {}
        for name, found in theirs.items():
            ends = [found[row.source].losses[-1] for row in complete if row.source in found]
            if len(ends) == len(complete) and None not in ends:
                means[name] = {"mean": HeldOut("mean", (_mean(ends),))}
        lines.append(_held_out_line(mean, {name: means.get(name, {}) for name in theirs}))
    note = f"Only the first {MAX_ROWS} of {len(rows):,} sources are shown." if len(rows) > MAX_ROWS else ""
    return DataTable("Held-out loss", headers, lines, frozenset({len(at) + 3}), note)


def _held_out_line(row: HeldOut, theirs: Mapping[str, Mapping[str, HeldOut]]) -> list[str]:
    relative = row.change / row.losses[0] if row.change is not None and row.losses[0] else None
    line = [row.source, *map(decimal, row.losses), signed(row.change)]
    line += [f"{signed(None if relative is None else 100 * relative, 1)} %", row.verdict]
    for found in theirs.values():
        other = found[row.source].losses[-1] if row.source in found else None
        own = row.losses[-1]
        line += [decimal(other), signed(own - other if own is not None and other is not None else None)]
    return line


def _task_parts(run: RunRecord, others: Sequence[RunRecord], num_unequal: int) -> Iterator[DataTable | CurveChart]:
    at, own_scores = task_scores(run)
    other_scores = {
        other.title: {(score.task, score.metric): score for score in task_scores(other)[1]} for other in others
    }
    scores = [*own_scores, *_scores_of_others(own_scores, other_scores, len(at))]
    if not scores:
        return
    headers = [
        "task",
        "metric",
        *(stage.header for stage in at),
        "change",
        "result",
        *(f"{name}: end" for name in other_scores),
    ]
    rows = []
    for score in scores[:MAX_ROWS]:
        line = [score.task, score.metric.removesuffix(",none")]
        line += [with_error(value, error) for value, error in zip(score.values, score.errors, strict=True)]
        line += [with_error(score.change, score.change_error, signed), score.verdict]
        for found in other_scores.values():
            other = found.get((score.task, score.metric))
            line.append(with_error(other.values[-1], other.errors[-1]) if other else MISSING)
        rows.append(line)
    note = f"A change below {_CERTAIN:g} standard errors is within the error."
    note += " The ± of a change treats both evaluations as independent, which is cautious: they share their documents."
    if num_unequal:
        subject = "1 task was" if num_unequal == 1 else f"{num_unequal:,} tasks were"
        note += f" {subject} not measured on the same documents and prompts: see the notes at the end."
    if len(scores) > MAX_ROWS:
        note += f" Only the first {MAX_ROWS} of {len(scores):,} metrics are shown."
    yield DataTable("Tasks", headers, rows, frozenset({1, len(at) + 3}), note)
    steps = sorted(run.evaluations)
    if len(steps) < 2:
        return
    for metric, is_lower in _common_metrics(own_scores):
        tasks = [score.task for score in own_scores if (score.metric, score.is_lower_better) == (metric, is_lower)]
        tasks = tasks[:MAX_CURVES]
        results = [run.evaluations[step] for step in steps]
        yield CurveChart(
            f"tasks-{metric}",
            f"Tasks: {metric.removesuffix(',none')}{f' ({run.title})' if others else ''}",
            "lower is better" if is_lower else "higher is better",
            f"{len(tasks)} tasks, evaluated {len(steps)} times; bars are one standard error.",
            steps,
            [
                Curve(
                    task,
                    [finite(one.get(task, {}).get(metric)) for one in results],
                    [finite(one.get(task, {}).get(error_name(metric))) for one in results],
                )
                for task in tasks
            ],
            run.switches,
            has_points=True,
        )


def _scores_of_others(
    own_scores: Sequence[TaskScore], other_scores: Mapping[str, Mapping[tuple[str, str], TaskScore]], num_stages: int
) -> Iterator[TaskScore]:
    """Yield the metrics that only other runs have, as not measured in this run."""
    known = {(score.task, score.metric) for score in own_scores}
    unknown = (None,) * num_stages
    keys = {key: score.is_lower_better for found in other_scores.values() for key, score in found.items()}
    for key in sorted(keys.keys() - known):
        yield TaskScore(*key, unknown, unknown, keys[key])


def _average_parts(run: RunRecord) -> Iterator[DataTable]:
    """Yield tables of the moving average of the weights beside the weights themselves."""
    at, rows = held_out(run, of_average=True)
    own = {row.source: row.losses[-1] for row in held_out(run)[1]}
    if rows:
        lines = []
        for row in rows[:MAX_ROWS]:
            last, weights = row.losses[-1], own.get(row.source)
            gain = last - weights if last is not None and weights is not None else None
            lines.append([row.source, *map(decimal, row.losses), decimal(weights), signed(gain)])
        headers = ["held-out source", *(stage.header for stage in at), "weights", "average − weights"]
        yield DataTable("Held-out loss of the moving average (EMA)", headers, lines, frozenset(), "")
    at, scores = task_scores(run, of_average=True)
    theirs = {(score.task, score.metric): score for score in task_scores(run)[1]}
    if scores:
        lines = []
        for score in scores[:MAX_ROWS]:
            line = [score.task, score.metric.removesuffix(",none")]
            line += [with_error(value, error) for value, error in zip(score.values, score.errors, strict=True)]
            other = theirs.get((score.task, score.metric))
            line.append(with_error(other.values[-1], other.errors[-1]) if other else MISSING)
            lines.append(line)
        headers = ["task", "metric", *(stage.header for stage in at), "weights"]
        yield DataTable("Tasks of the moving average (EMA)", headers, lines, frozenset({1}), "")


def _common_metrics(scores: Sequence[TaskScore]) -> list[tuple[str, bool]]:
    """Return the two metrics that most tasks have, and whether lower is better; bits per byte and losses first."""
    counts = Counter((score.metric, score.is_lower_better) for score in scores)
    most = sorted(counts, key=lambda key: (-counts[key], key))[:2]
    return sorted(most, key=lambda key: not key[1])


def with_error(value: float | None, error: float | None, form: Callable[[float | None, int], str] = decimal) -> str:
    """Return a value with its standard error, with three decimals; with four where no error is known."""
    if value is None or error is None:
        return form(value, 4)
    return f"{form(value, 3)} ± {error:.3f}"


def _known(value: float | None) -> float | None:
    return value if value is not None and not math.isnan(value) else None


def _mean(values: Sequence[float | None]) -> float:
    return math.fsum(value for value in values if value is not None) / len(values)
