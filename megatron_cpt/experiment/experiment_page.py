"""Report of an experiment: ranking of its arms, every run, and the curves and configurations of the arms."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import orjson

from megatron_cpt.config import format_number_of
from megatron_cpt.experiment.arms import Experiment
from megatron_cpt.experiment.compare_arms import METHOD, ArmRow, Comparison, MetricRanking
from megatron_cpt.experiment.result_file import RESULT_FILE
from megatron_cpt.report.course import curves_section
from megatron_cpt.report.html_page import html_page
from megatron_cpt.report.learning import MAX_CURVES
from megatron_cpt.report.markdown_page import markdown_page
from megatron_cpt.report.page import (
    MISSING,
    ChangeChart,
    Curve,
    CurveChart,
    DataTable,
    PageSection,
    RunPage,
    decimal,
    finite,
    signed,
)
from megatron_cpt.report.run_digests import configuration_section, identity_section
from megatron_cpt.report.run_record import RunReader, RunRecord
from megatron_cpt.report.write_report import write_report_file

_MAX_COMPARED = 24  # arms with columns of their own in the table of settings


def write_results(experiment: Experiment, comparison: Comparison) -> list[Path]:
    """Write report.html, summary.json and summary.md into the experiment's folder; return their paths.

    Raises:
        CptError: a file cannot be written.
    """
    page = experiment_page(experiment, comparison)
    contents = {
        "report.html": html_page(page),
        "summary.json": orjson.dumps(_without_nan(comparison.to_dict()), option=_JSON_OPTIONS).decode() + "\n",
        "summary.md": markdown_page(replace(page, sections=page.sections[:2])),
    }
    for name, content in contents.items():
        write_report_file(experiment.output / name, content)
    return [experiment.output / name for name in contents]


_JSON_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS


def experiment_page(experiment: Experiment, comparison: Comparison) -> RunPage:
    """Return the report of an experiment."""
    finished = [unit for unit in experiment.units if (unit.folder / RESULT_FILE).is_file()]
    first = {unit.arm: unit for unit in reversed(finished)}  # per arm, the finished run with the first seed
    arms = [name for name in experiment.config.arms if name in first]
    records = {unit.name: RunReader(unit.folder).read() for unit in finished}
    shown = [replace(records[first[arm].name], title=arm) for arm in arms]
    sections = [_ranking_section(comparison), _runs_section(experiment, comparison)]
    if shown:
        sections += [
            _course_section(experiment, records),
            curves_section(shown[:MAX_CURVES]),
            configuration_section(shown[:_MAX_COMPARED]),
            identity_section(shown[:_MAX_COMPARED]),
        ]
    runs = f"{format_number_of(len(experiment.config.arms), 'arm')}, {format_number_of(len(comparison.seeds), 'seed')}"
    return RunPage(
        title=comparison.name,
        subtitle=f"Experiment in {experiment.output}: {runs}",
        summary=comparison.sentences(),
        sections=sections,
        data=_without_nan(orjson.loads(orjson.dumps(comparison.to_dict(), option=_JSON_OPTIONS))),
    )


def _ranking_section(comparison: Comparison) -> PageSection:
    parts = [part for ranking in comparison.rankings for part in _ranking_parts(comparison, ranking)]
    return PageSection("ranking", "Arms by metric", [METHOD], parts)


def _ranking_parts(comparison: Comparison, ranking: MetricRanking) -> Iterator[DataTable | ChangeChart]:
    direction = "lower is better" if ranking.is_lower_better else "higher is better"
    others = [row for row in ranking.rows if row.difference is not None and row.difference.num_seeds]
    if others:
        series = f"difference from {comparison.baseline}"
        yield ChangeChart(
            f"difference-{ranking.metric}",
            f"{ranking.metric}: {series}",
            f"{ranking.unit}; {direction}; lines are {comparison.confidence:.0%} intervals",
            f"{len(others)} arms; {others[0].arm} ranks first among them.",
            [row.arm for row in others],
            {series: [finite(row.difference.mean) if row.difference else None for row in others]},
            {series: [finite(row.difference.half_width) if row.difference else None for row in others]},
        )
    headers = ["arm", "mean", "difference", "p", "against the baseline", "not told apart from"]
    title = f"{ranking.metric}, {ranking.unit}: {direction}"
    yield DataTable(title, headers, [ranking_cells(row) for row in ranking.rows], frozenset({4, 5}))


def ranking_cells(row: ArmRow) -> list[str]:
    """Return an arm's cells: name, mean, difference, p, verdict, and the arms that it is not told apart from."""
    difference = row.difference
    return [
        row.arm,
        _with_half_width(decimal(row.mean), row.half_width),
        _with_half_width(signed(difference.mean), difference.half_width) if difference else MISSING,
        decimal(row.corrected_p, 3),
        row.verdict,
        ", ".join(row.tied_with) or MISSING,
    ]


def _with_half_width(text: str, half_width: float | None) -> str:
    return text if half_width is None else f"{text} ± {half_width:.4f}"


def _runs_section(experiment: Experiment, comparison: Comparison) -> PageSection:
    by_arm = [{row.arm: row.values for row in ranking.rows} for ranking in comparison.rankings]
    rows = [[unit.name, *(decimal(values[unit.arm].get(unit.seed)) for values in by_arm)] for unit in experiment.units]
    table = DataTable("Runs", ["run", *(ranking.metric for ranking in comparison.rankings)], rows)
    sentence = f"Each run is a run directory in {experiment.output}; `megatron-cpt report` shows it."
    return PageSection("runs", "Every run", [sentence], [table])


def _course_section(experiment: Experiment, records: dict[str, RunRecord]) -> PageSection:
    """Return the chart of the first held-out metric over the steps: per arm the mean over its finished runs."""
    metric = next((metric for metric in experiment.metrics if metric.sources), None)
    curves: dict[str, dict[int, float]] = {}
    for arm in experiment.config.arms if metric else ():
        runs = [records[unit.name] for unit in experiment.units if unit.arm == arm and unit.name in records]
        steps = set.intersection(*(set(run.metrics.validations) for run in runs)) if runs else set()
        means = {step: _mean_loss(runs, step, metric.sources) for step in steps} if metric else {}
        curves[arm] = {step: mean for step, mean in means.items() if mean is not None}
    at = sorted({step for curve in curves.values() for step in curve})
    shown = {arm: curve for arm, curve in list(curves.items())[:MAX_CURVES] if curve}
    if len(at) < 2 or metric is None:
        return PageSection("course", "Held-out loss over the steps", ["It was measured at fewer than two steps."])
    chart = CurveChart(
        "held-out-course",
        f"Held-out loss: {metric.name}",
        "nats per token, mean over seeds",
        f"{len(shown)} arms, measured at {len(at)} steps.",
        at,
        [Curve(arm, [finite(curve.get(step)) for step in at]) for arm, curve in shown.items()],
        has_points=len(at) <= 60,
        may_coincide=True,
    )
    return PageSection("course", "Held-out loss over the steps", (), [chart])


def _mean_loss(runs: Sequence[RunRecord], step: int, sources: Sequence[str]) -> float | None:
    losses = [run.metrics.validations[step].get(source) for run in runs for source in sources]
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if known and len(known) == len(losses) else None


def _without_nan(value: object) -> dict[str, object]:
    """Return plain values in which NaN, which JSON does not have, is null; orjson writes it so."""
    found = orjson.loads(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS))
    assert isinstance(found, dict)
    return found
