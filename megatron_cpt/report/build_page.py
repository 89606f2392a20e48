"""A report of a run, alone or compared with others: the summary and all sections."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from megatron_cpt.config import format_count, format_number_of
from megatron_cpt.report.course import curves_section, plan_section, rate_verdict, seen_switch, sources_section
from megatron_cpt.report.learning import held_out, learning_section, task_scores
from megatron_cpt.report.metrics_columns import number
from megatron_cpt.report.operation import (
    duration,
    fallbacks,
    health_section,
    median_mfu,
    median_speed,
    num_restarts,
    skipped_updates,
    speed_section,
    time_spent,
)
from megatron_cpt.report.page import PageSection, RunPage, decimal, finite, percent, signed, whole
from megatron_cpt.report.run_digests import configuration_section, differences, digests, identity_section
from megatron_cpt.report.run_record import RunRecord, unequal_measurements

_SAME_START = 1e-4  # nats per token by which two runs from the same weights may differ at step 0


def build_page(runs: Sequence[RunRecord]) -> RunPage:
    """Return the report of the first run, compared with the others."""
    run, *others = runs = distinct_titles(runs)
    compared = f", compared with {', '.join(other.title for other in others)}" if others else ""
    notes = [f"{one.title}: {note}" if others else note for one in runs for note in one.notes]
    unequal = list(unequal_measurements(runs))
    notes += unequal
    sections = [
        learning_section(run, others, num_unequal=len(unequal)),
        curves_section(runs),
        plan_section(run),
        sources_section(run),
        speed_section(runs),
        health_section(run),
        configuration_section(runs),
        identity_section(runs),
    ]
    if notes:
        sections.append(PageSection("notes", "Notes on files and tasks", notes))
    return RunPage(
        title=f"{run.title}",
        subtitle=f"Report of the run in {run.folder}{compared}",
        summary=[*_summary(run, others)],
        sections=sections,
        notes=notes,
        data={"format": "megatron-cpt report", "format_version": 1, "runs": [_run_data(one) for one in runs]},
    )


def distinct_titles(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs with titles that differ: the name, if several share it with the folder, else with a number."""
    names = [run.title for run in runs]
    titled = [replace(run, title=f"{run.title} ({run.folder})") if names.count(run.title) > 1 else run for run in runs]
    titles = [run.title for run in titled]
    return [
        replace(run, title=f"{run.title} [{place}]") if titles.count(run.title) > 1 else run
        for place, run in enumerate(titled, start=1)
    ]


def _summary(run: RunRecord, others: Sequence[RunRecord]) -> Iterator[str]:
    yield _progress_sentence(run)
    yield from _held_out_sentences(run)
    yield from _task_sentences(run)
    yield from _comparison_sentences(run, others)
    yield from _switch_sentences(run)
    yield from _speed_sentences(run)
    yield _health_sentence(run)


def _progress_sentence(run: RunRecord) -> str:
    planned = run.planned_steps
    tokens = number(run.metrics.last.get("tokens"))
    read = "" if math.isnan(tokens) else f", {format_count(tokens)} tokens"
    if planned is None:
        return f"{run.step:,} steps{read}; the plan is unknown."
    if run.step >= planned:
        return f"Finished: all {planned:,} steps{read}."
    return f"Not finished: {run.step:,} of {planned:,} steps ({percent(run.step / planned)}){read}."


def _held_out_sentences(run: RunRecord) -> Iterator[str]:
    at, rows = held_out(run)
    changed = [row for row in rows if row.change is not None]
    if not changed:
        yield "Learning and forgetting are unknown: no held-out losses at two steps."
        return
    learned = sorted((row for row in changed if row.verdict == "learned"), key=lambda row: row.change or 0.0)
    forgot = sorted((row for row in changed if row.verdict == "forgot"), key=lambda row: -(row.change or 0.0))
    mean = math.fsum(row.change or 0.0 for row in changed) / len(changed)
    most = f", most on {learned[0].source} ({signed(learned[0].change, 3)})" if learned else ""
    yield (
        f"Learned: held-out loss fell on {len(learned)} of {len(changed)} sources{most}; the mean changed by "
        f"{signed(mean, 3)} nats per token since step {at[0].step:,}."
    )
    if forgot:
        worst = f", most on {forgot[0].source} ({signed(forgot[0].change, 3)})"
        yield f"Forgot: held-out loss rose on {len(forgot)} of {len(changed)} sources{worst}."
    else:
        yield "Forgot nothing: no held-out source is worse than before."


def _task_sentences(run: RunRecord) -> Iterator[str]:
    at, scores = task_scores(run)
    changed = [score for score in scores if score.change is not None]
    if not changed:
        return
    counts = Counter(score.verdict for score in changed)
    verdicts = ("better", "worse", "better, error unknown", "worse, error unknown", "within error", "same")
    parts = [f"{counts[verdict]} {_in_brackets(verdict)}" for verdict in verdicts if counts[verdict]]
    yield f"Tasks: {', '.join(parts)} of {len(changed)} metrics, step {at[0].step:,} to {at[-1].step:,}."


def _in_brackets(verdict: str) -> str:
    """Return a verdict for a list with commas: "better, error unknown" becomes "better (error unknown)"."""
    word, comma, rest = verdict.partition(", ")
    return f"{word} ({rest})" if comma else word


def _comparison_sentences(run: RunRecord, others: Sequence[RunRecord]) -> Iterator[str]:
    own = {row.source: row.losses for row in held_out(run)[1]}
    for other in others:
        theirs = {row.source: row.losses for row in held_out(other)[1]}
        ends = [(own[name][-1], theirs[name][-1]) for name in own if name in theirs]
        gaps = [mine - their for mine, their in ends if mine is not None and their is not None]
        differ = format_number_of(len(differences([run.config, other.config]).keys() - {"name", "output"}), "setting")
        if not gaps:
            yield f"Against {other.title}: no held-out source in common; {differ} differ."
            continue
        starts = [(own[name][0], theirs[name][0]) for name in own if name in theirs]
        moved = any(a is not None and b is not None and abs(a - b) > _SAME_START for a, b in starts)
        note = " The two began at different losses, so from different weights." if moved else ""
        yield (
            f"Against {other.title}: lower held-out loss at the end on {sum(gap < 0 for gap in gaps)} of {len(gaps)} "
            f"sources, mean {signed(math.fsum(gaps) / len(gaps), 3)}; {differ} differ.{note}"
        )


def _switch_sentences(run: RunRecord) -> Iterator[str]:
    columns = run.metrics.scalars
    logged = [place for place, loss in enumerate(columns["loss"]) if math.isfinite(loss)]
    text = ""
    if logged:
        first, last = logged[0], logged[-1]
        losses, rates = ((columns[name][first], columns[name][last]) for name in ("loss", "lr"))
        text = f"Course: training loss {decimal(losses[0], 3)} to {decimal(losses[1], 3)}"
        has_rates = all(map(math.isfinite, rates))
        if has_rates:
            text += f", learning rate {rates[0]:.3g} to {rates[1]:.3g}"
        steps = run.metrics.steps
        text += f" over steps {steps[first]:,} to {steps[last]:,}" if first < last else f" at step {steps[first]:,}"
        if has_rates and run.schedule is not None:
            text += f" (learning rate {rate_verdict(run)})"
    for last_step, name in run.switches if run.phases else ():
        verdict = seen_switch(run, last_step, name)[1]
        text += f"{'; ' if text else 'Course: '}switch to phase {name} after step {last_step:,}, {verdict}"
    if text:
        yield f"{text}."


def _speed_sentences(run: RunRecord) -> Iterator[str]:
    speed, mfu, spent = median_speed(run), median_mfu(run), time_spent(run)
    if math.isnan(speed):
        return
    text = f"Speed: {whole(speed) if speed < 1e6 else format_count(speed)} tokens per second"
    text += "" if math.isnan(mfu) else f", MFU {percent(mfu)}"
    text += f"; {duration(spent.steps)} in training steps"
    text += "" if math.isnan(spent.wall) else f" of {duration(spent.wall)} since the first start"
    yield f"{text}."


def _health_sentence(run: RunRecord) -> str:
    counts = {"restart": num_restarts(run), "bad step": len(run.anomalies), "skipped update": skipped_updates(run)}
    counts["corrupt checkpoint"] = len(fallbacks(run))
    named = [format_number_of(count, noun) for noun, count in counts.items() if noun != "restart" or run.events]
    return f"Health: {', '.join(named if run.events else ['restarts unknown', *named])}."


def _run_data(run: RunRecord) -> dict[str, Any]:
    """Return the figures of a run for programs; the charts have their numbers in the page as well."""
    at, rows = held_out(run)
    task_at, scores = task_scores(run)
    spent = time_spent(run)
    return {
        "name": run.title,
        "folder": str(run.folder),
        "steps": run.step,
        "planned_steps": run.planned_steps,
        "tokens": finite(number(run.metrics.last.get("tokens"))),
        "switches": [{"after_step": step, "to": name} for step, name in run.switches],
        "held_out": {
            "steps": [stage.step for stage in at],
            "loss": {row.source: [finite(loss) for loss in row.losses] for row in rows},
        },
        "tasks": {
            "steps": [stage.step for stage in task_at],
            "scores": [
                {
                    "task": score.task,
                    "metric": score.metric,
                    "values": [finite(value) for value in score.values],
                    "stderr": [finite(error) for error in score.errors],
                }
                for score in scores
            ],
        },
        "tokens_per_second": finite(median_speed(run)),
        "mfu": finite(median_mfu(run)),
        "seconds": {
            "training": finite(spent.steps),
            "data_wait": finite(spent.data_wait),
            "sync_wait": finite(spent.sync_wait),
            "pauses": finite(spent.pauses),
            "wall": finite(spent.wall),
        },
        "restarts": num_restarts(run) if run.events else None,
        "bad_steps": [line["step"] for line in run.anomalies[:1000]],
        "skipped_updates": skipped_updates(run),
        "checkpoint_fallbacks": fallbacks(run),
        "digests": dict(digests(run)),
        "notes": list(run.notes),
    }
