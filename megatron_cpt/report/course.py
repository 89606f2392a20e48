"""Course of a run: plan and reality, learning rate and loss over time, and the tokens read of each source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_cpt.config import format_count
from megatron_cpt.report.downsample import downsample
from megatron_cpt.report.learning import MAX_CURVES, MAX_ROWS
from megatron_cpt.report.metrics_columns import as_mapping, number
from megatron_cpt.report.page import (
    MISSING,
    Curve,
    CurveChart,
    DataTable,
    PageSection,
    decimal,
    finite,
    percent,
    signed,
    whole,
)
from megatron_cpt.report.run_record import RunRecord

_MAX_VALUES = 60_000  # numbers in all charts of a report, which keeps it below a megabyte
_MAX_BUCKETS = 500
_RATE_TOLERANCE = 1e-6
_RATES_COMPARED = 500


def plan_section(run: RunRecord) -> PageSection:
    """Return the table of planned and actual figures."""
    rows = [row for row in _plan_rows(run) if row[1] != MISSING or row[2] != MISSING]
    table = DataTable("Plan and reality", ["figure", "planned", "happened", "difference"], rows, frozenset({3}))
    return PageSection("plan", "Planned against what happened", (), [table] if rows else [])


def _plan_rows(run: RunRecord) -> Iterator[list[str]]:
    plan, metrics = run.plan, run.metrics
    tokens, planned_tokens = number(metrics.last.get("tokens")), number(plan.get("tokens_trained"))
    yield _count_row("steps", number(run.planned_steps), float(run.step))
    yield _count_row("tokens", planned_tokens, tokens)
    for last_step, name in run.switches if run.phases else ():
        yield [f"switch to {name}", f"after step {last_step:,}", *seen_switch(run, last_step, name)]
    for number_, phase in enumerate(run.phases, start=1):
        done = min(max(run.step - phase.first_step + 1, 0), phase.last_step - phase.first_step + 1)
        planned = float(phase.last_step - phase.first_step + 1)
        yield _count_row(f"steps of phase {number_}, {phase.name}", planned, float(done))
    if run.schedule is not None and metrics.steps:
        last = metrics.steps[-1]
        rate = metrics.scalars["lr"][-1]
        actual = MISSING if math.isnan(rate) else f"{rate:.4g}"
        yield [f"learning rate of step {last:,}", f"{run.schedule.rate(last):.4g}", actual, rate_verdict(run)]
    if run.is_on_cpu:
        return
    memory = number(plan.get("memory_per_gpu_gib"))
    peak = max((value for value in metrics.scalars["peak_memory_gib"] if not math.isnan(value)), default=math.nan)
    yield ["peak memory of rank 0, GiB", decimal(memory, 2), decimal(peak, 2), signed(peak - memory, 2)]


def seen_switch(run: RunRecord, last_step: int, name: str) -> tuple[str, str]:
    """Return between which lines of metrics the phase changed, and whether that agrees with the plan."""
    first = next((step for step, phase in run.metrics.phases if phase == name), None)
    if first is None:
        return (MISSING, "not reached" if run.step <= last_step else "not seen")
    before = max((step for step in run.metrics.steps if step < first), default=0)
    seen = f"between the lines of steps {before:,} and {first:,}"
    return seen, "as planned" if before <= last_step < first else "differs"


def rate_verdict(run: RunRecord) -> str:
    """Compare the recorded learning rates with the schedule, over the steps that followed the current plan."""
    assert run.schedule is not None
    starts = [line["after_step"] for line in run.plans if isinstance(line.get("after_step"), int)]
    first = starts[-1] + 1 if starts else 1
    pairs = [(s, rate) for s, rate in zip(run.metrics.steps, run.metrics.scalars["lr"], strict=True) if s >= first]
    pairs = pairs[:: max(1, len(pairs) // _RATES_COMPARED)]
    scale = max(run.schedule.max_lr, 1e-300)
    pairs = [(step, rate) for step, rate in pairs if not math.isnan(rate)]
    if not pairs:
        return "unknown: no line names it"
    worst = max(abs(run.schedule.rate(step) - rate) / scale for step, rate in pairs)
    lines = f"at {len(pairs):,} lines"
    return f"as planned {lines}" if worst <= _RATE_TOLERANCE else f"up to {percent(worst)} of the maximum {lines}"


def _count_row(name: str, planned: float, actual: float) -> list[str]:
    difference = actual - planned
    text = MISSING if math.isnan(difference) else f"{difference:+,.0f}".replace("-", "−") if difference else "none"
    return [name, whole(planned), whole(actual), text]


def curves_section(runs: Sequence[RunRecord]) -> PageSection:
    """Return the charts of the loss and the learning rate of all runs, and of the loss by source of the first one."""
    run = runs[0]
    shown = _largest_sources(run)
    buckets = max(50, min(_MAX_BUCKETS, _MAX_VALUES // (2 * (3 * len(runs) + len(shown) + 2))))
    parts: list[DataTable | CurveChart] = []
    if any(one.metrics.steps for one in runs):
        flags = [(int(line["step"]), str(line.get("kind", "anomaly"))) for line in run.anomalies[:500]]
        loss = _chart(runs, "loss", "Training loss", "nats per token", buckets, flags)
        parts = [loss, _chart(runs, "lr", "Learning rate", "", buckets)]
    if shown and run.metrics.steps:
        steps, values = downsample(
            run.metrics.steps, {name: run.metrics.loss_by_source[name] for name in shown}, buckets
        )
        curves = [Curve(name, [finite(value) for value in values[name].tolist()]) for name in shown]
        rest = len(run.metrics.loss_by_source) - len(shown)
        text = f"{len(shown)} sources" + (f"; {rest} more in the table below" if rest > 0 else "")
        title = f"Training loss by source{f' ({run.title})' if len(runs) > 1 else ''}"
        parts.append(
            CurveChart("loss-by-source", title, "nats per token", f"{text}.", steps.tolist(), curves, run.switches)
        )
    sentences = [
        "A dotted line marks the switch of phase. Drag over a chart to zoom, double-click to see all of it again.",
    ]
    return PageSection("curves", "Loss and learning rate", sentences if parts else ["No training steps yet."], parts)


def _chart(
    runs: Sequence[RunRecord],
    column: str,
    title: str,
    unit: str,
    buckets: int,
    flags: Sequence[tuple[int, str]] = (),
) -> CurveChart:
    """Return a chart of one column of all runs, on the union of their steps."""
    values: list[dict[int, float | None]] = []
    for run in runs:
        steps, columns = downsample(run.metrics.steps, {column: run.metrics.scalars[column]}, buckets)
        values.append(dict(zip(steps.tolist(), map(finite, columns[column].tolist()), strict=True)))
    union = sorted(set().union(*values))
    curves = [Curve(run.title, [one.get(step) for step in union]) for run, one in zip(runs, values, strict=True)]
    known = [value for value in runs[0].metrics.scalars[column] if math.isfinite(value)]
    summary = f"{runs[0].title}: from {known[0]:.4g} to {known[-1]:.4g}." if known else "No finite value."
    return CurveChart(column, title, unit, summary, union, curves, runs[0].switches, flags, may_coincide=True)


def speed_charts(runs: Sequence[RunRecord]) -> list[CurveChart]:
    """Return the charts of tokens per second and, where it is known, of MFU."""
    runs = [run for run in runs if run.metrics.steps]
    charts = [_chart(runs, "tokens_per_second", "Tokens per second", "all ranks", _MAX_BUCKETS // 2)] if runs else []
    with_mfu = [run for run in runs if any(not math.isnan(value) for value in run.metrics.scalars["mfu"])]
    if with_mfu:
        charts.append(_chart(with_mfu, "mfu", "Model FLOPs utilization (MFU)", "share of the peak", _MAX_BUCKETS // 2))
    return charts


def _largest_sources(run: RunRecord) -> list[str]:
    """Return the sources with a loss curve that gave most samples, at most as many as a chart tells apart."""
    counts = as_mapping(run.metrics.last.get("samples_by_source"))
    names = sorted(run.metrics.loss_by_source, key=lambda name: -_count(counts, name))[:MAX_CURVES]
    return [name for name in run.metrics.loss_by_source if name in names]


def _count(counts: Mapping[str, Any], name: str) -> float:
    count = number(counts.get(name))
    return 0.0 if math.isnan(count) else count


def sources_section(run: RunRecord) -> PageSection:
    """Return the table of tokens and epochs of each source, planned and read."""
    counts = as_mapping(run.metrics.last.get("samples_by_source"))
    planned = as_mapping(run.plan.get("sources"))
    names = list(dict.fromkeys([*planned, *counts]))
    if not names:
        return PageSection("sources", "Tokens and epochs by source", ["No source has been read yet."])
    total = sum(_count(counts, name) for name in names)
    rows = []
    for name in names[:MAX_ROWS]:
        source, samples = as_mapping(planned.get(name)), _count(counts, name)
        length = number(source.get("tokens")) / number(source.get("samples")) if source.get("samples") else math.nan
        if math.isnan(length):
            length = number(run.metrics.last.get("seq_length"))
        epochs = number(source.get("epochs"))
        per_sample = epochs / number(source.get("samples")) if source.get("samples") else math.nan
        losses = [value for value in run.metrics.loss_by_source.get(name, ()) if math.isfinite(value)]
        rows.append(
            [
                name,
                _tokens(number(source.get("tokens"))),
                _tokens(samples * length),
                percent(samples / total if total else None),
                decimal(epochs, 3),
                decimal(samples * per_sample, 3),
                decimal(number(source.get("max_epochs")), 1),
                decimal(losses[0], 3) if losses else MISSING,
                decimal(losses[-1], 3) if losses else MISSING,
            ]
        )
    headers = ["source", "tokens planned", "tokens read", "share", "epochs planned", "epochs read", "limit"]
    headers += ["first loss", "last loss"]
    note = f"Only the first {MAX_ROWS} of {len(names):,} sources are shown." if len(names) > MAX_ROWS else ""
    return PageSection(
        "sources",
        "Tokens and epochs by source",
        [],
        [DataTable("Tokens read by source", headers, rows, note=note), *_blend_table(run)],
    )


def _tokens(count: float) -> str:
    return MISSING if math.isnan(count) else format_count(count)


def _blend_table(run: RunRecord) -> Iterator[DataTable]:
    """Yield the weights of each source in each phase, if the plan has several phases."""
    phases = run.plan.get("phases")
    if not isinstance(phases, list) or len(phases) < 2 or len(phases) != len(run.phases):
        return
    uses = [as_mapping(as_mapping(phase).get("sources")) for phase in phases]
    names = list(dict.fromkeys(name for use in uses for name in use))
    rows = [
        [name, *(decimal(number(as_mapping(use.get(name)).get("weight")), 4) for use in uses)]
        for name in names[:MAX_ROWS]
    ]
    yield DataTable("Weight by phase", ["source", *(phase.name for phase in run.phases)], rows)
