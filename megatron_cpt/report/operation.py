"""Operation of a run: speed, where its time went, restarts, bad steps and the documents behind them."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.config import format_count, format_number_of
from megatron_cpt.report.course import speed_charts
from megatron_cpt.report.metrics_columns import as_mapping, is_step, number
from megatron_cpt.report.page import MISSING, DataTable, PageSection, decimal, percent, signed, whole
from megatron_cpt.report.run_record import RunRecord

_MAX_EVENT_ROWS = 50
_MAX_ANOMALY_ROWS = 50
_MAX_SAMPLES = 8  # samples of one bad step that are shown
_MAX_DOCUMENTS = 6


@dataclass(frozen=True)
class TimeSpent:
    """Seconds of a run by what they were spent on; NaN: unknown."""

    steps: float
    data_wait: float
    sync_wait: float
    pauses: float
    wall: float


def time_spent(run: RunRecord) -> TimeSpent:
    """Return where the time of a run went, by the lines of metrics and of events.

    A line has means over the steps since the line before. Example: lines at steps 10 and 30 with 2.0 and 1.0 seconds
    per step stand for 10 x 2 + 20 x 1 = 40 seconds.
    """
    scalars = run.metrics.scalars
    covered = np.diff(np.array(run.metrics.steps, dtype=np.float64), prepend=0.0)
    with np.errstate(over="ignore"):  # a damaged line may hold any number
        sums = {
            name: float(np.nansum(np.array(scalars[f"{name}_seconds"]) * covered))
            for name in ("step", "data_wait", "sync_wait")
        }
    last_pauses = [number(line.get("pause_seconds")) for line in run.events if line.get("event") == "stop"]
    pauses = np.array([*scalars["pause_seconds"], *last_pauses])
    known_pauses = float(np.nansum(pauses)) if np.isfinite(pauses).any() else math.nan
    return TimeSpent(sums["step"], sums["data_wait"], sums["sync_wait"], known_pauses, _wall_seconds(run))


def _wall_seconds(run: RunRecord) -> float:
    """Return the seconds from the start of the first process to the last event; NaN without both.

    The first event is written after imports and set-up, which its `startup_seconds` add; earlier versions had no such
    field.
    """
    times = [number(line.get("time")) for line in run.events]
    if len(times) < 2:
        return math.nan
    startup = number(run.events[0].get("startup_seconds"))
    return times[-1] - times[0] + (startup if startup > 0 else 0.0)


def median_speed(run: RunRecord) -> float:
    """Return the median of tokens per second over the lines of metrics; NaN without one."""
    known = [value for value in run.metrics.scalars["tokens_per_second"] if math.isfinite(value)]
    return statistics.median(known) if known else math.nan


def median_mfu(run: RunRecord) -> float:
    """Return the median MFU; NaN if the peak of the device is unknown."""
    known = [value for value in run.metrics.scalars["mfu"] if math.isfinite(value)]
    return statistics.median(known) if known else math.nan


def skipped_updates(run: RunRecord) -> int:
    """Return how many updates were skipped since the start of the run."""
    count = run.metrics.last.get("skipped_updates")
    return count if is_step(count) else 0


def starts(run: RunRecord) -> list[Mapping[str, Any]]:
    """Return the starts of the run's processes."""
    return [line for line in run.events if line.get("event") == "start"]


def num_restarts(run: RunRecord) -> int:
    """Return how often the run was resumed or started over."""
    return max(len(starts(run)) - 1, len(run.metrics.resumed_after), 0)


def fallbacks(run: RunRecord) -> list[str]:
    """Return the checkpoints that a start has skipped as corrupt."""
    skipped = (line.get("skipped_checkpoints") for line in starts(run))
    return [str(name) for names in skipped if isinstance(names, list) for name in names]


def speed_section(runs: Sequence[RunRecord]) -> PageSection:
    """Return the charts and tables of speed and time."""
    rows = []
    for run in runs:
        memory = [value for value in run.metrics.scalars["peak_memory_gib"] if math.isfinite(value)]
        speed = median_speed(run)
        tflops = [value for value in run.metrics.scalars["tflops_per_gpu"] if math.isfinite(value)]
        rows.append(
            [
                run.title,
                MISSING if math.isnan(speed) else format_count(speed),
                decimal(statistics.median(tflops), 2) if tflops else MISSING,
                percent(median_mfu(run)),
                decimal(max(memory), 1) if memory else MISSING,
                _ranks(run),
            ]
        )
    headers = ["run", "tokens/s", "TFLOP/s per GPU", "MFU", "peak memory, GiB", "ranks"]
    tables = [
        DataTable("Speed (medians)", headers, rows),
        DataTable("Time by activity", ["time", *_titles(runs)], _time_rows(runs)),
    ]
    known = [run for run in runs if run.metrics.steps]
    return PageSection("speed", "Speed and time", [], [*tables, *speed_charts(runs)] if known else [])


def _titles(runs: Sequence[RunRecord]) -> list[str]:
    return [f"{run.title}{suffix}" for run in runs for suffix in ("", ": share")]


def _time_rows(runs: Sequence[RunRecord]) -> list[list[str]]:
    spent = [time_spent(run) for run in runs]
    parts = {
        "training steps": [one.steps for one in spent],
        "  of it: waiting for data": [one.data_wait for one in spent],
        "  of it: waiting for device and other ranks": [one.sync_wait for one in spent],
        "validation, evaluation and saves": [one.pauses for one in spent],
        "start-up and time between processes": [
            one.wall - one.steps - (0.0 if math.isnan(one.pauses) else one.pauses) for one in spent
        ],
        "from the first start to the last event": [one.wall for one in spent],
    }
    rows = []
    for name, seconds in parts.items():
        row = [name]
        for value, one in zip(seconds, spent, strict=True):
            total = one.steps if math.isnan(one.wall) else one.wall
            row += [duration(value), percent(value / total) if total else MISSING]
        if any(not math.isnan(value) for value in seconds):
            rows.append(row)
    return rows


def duration(seconds: float) -> str:
    """Return seconds as people say them: 45.2 s, 12 min 5 s, 3 h 50 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return MISSING
    seconds = max(seconds, 0.0)
    if seconds < 60:
        return f"{seconds:.1f} s"
    for small, (unit, size), (smaller_unit, smaller) in (
        (3600, ("min", 60), ("s", 1)),
        (86400, ("h", 3600), ("min", 60)),
        (math.inf, ("d", 86400), ("h", 3600)),
    ):
        whole_seconds = round(seconds / smaller) * smaller
        if whole_seconds < small:
            return f"{whole_seconds // size:g} {unit} {whole_seconds % size // smaller:g} {smaller_unit}"
    return MISSING


def _ranks(run: RunRecord) -> str:
    found = [str(line.get("ranks")) for line in starts(run) if line.get("ranks")]
    layout = as_mapping(as_mapping(run.newest.state if run.newest else {}).get("layout"))
    return ", ".join(dict.fromkeys(found)) or whole(layout.get("world_size"))


def health_section(run: RunRecord) -> PageSection:
    """Return restarts, fallbacks, skipped steps and anomalies, with the documents of the bad steps."""
    parts = [*_event_table(run), *_anomaly_tables(run)]
    sentences = [_restart_sentence(run), _anomaly_sentence(run)]
    if run.anomalies:
        step = int(run.anomalies[-1]["step"])
        sentences.append(f"Text of a step's documents: megatron-cpt trace {run.folder} --step {step}")
    return PageSection("health", "Restarts and bad steps", sentences, parts)


def _restart_sentence(run: RunRecord) -> str:
    skipped = fallbacks(run)
    fell_back = f"Skipped as corrupt: {', '.join(skipped)}." if skipped else "No checkpoint was skipped as corrupt."
    if not run.events:
        repeats = len(run.metrics.resumed_after)
        known = f"metrics.jsonl shows {repeats} at least" if repeats else "events.jsonl is missing"
        return f"Restarts: unknown; {known}."
    count = num_restarts(run)
    return f"{count} restart{'' if count == 1 else 's'}. {fell_back}"


def _anomaly_sentence(run: RunRecord) -> str:
    kinds = Counter(str(line.get("kind")) for line in run.anomalies)
    named = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    skipped = skipped_updates(run)
    return f"Bad steps: {named or 'none'}. {skipped} update{'' if skipped == 1 else 's'} skipped."


def _event_table(run: RunRecord) -> Iterator[DataTable]:
    rows = []
    previous = ""
    for line in run.events:
        kind = str(line.get("event"))
        if kind == "start":
            if previous == "start":
                rows.append([MISSING, "ended without a record", MISSING, "killed, or failed with an error"])
            origin = f"from {line.get('from')}" if line.get("from") else "random weights"
            skipped = line.get("skipped_checkpoints")
            fell_back = f"; skipped {', '.join(map(str, skipped))}" if isinstance(skipped, list) and skipped else ""
            ranks = line.get("ranks")
            number_of_ranks = format_number_of(ranks, "rank") if is_step(ranks) else f"{ranks} ranks"
            detail = f"{origin}; {number_of_ranks} on {line.get('device')}{fell_back}"
            rows.append(
                [_clock(line), "resumed" if line.get("resumed") else "started", whole(line.get("step")), detail]
            )
        elif kind == "stop":
            rows.append([_clock(line), "stopped", whole(line.get("step")), str(line.get("reason") or "done")])
        previous = kind
    if rows:
        note = f"The last {_MAX_EVENT_ROWS} of {len(rows)} events." if len(rows) > _MAX_EVENT_ROWS else ""
        headers = ["time (UTC)", "event", "after step", "detail"]
        yield DataTable("Starts and stops", headers, rows[-_MAX_EVENT_ROWS:], frozenset({1, 3}), note)


def _clock(line: Mapping[str, Any]) -> str:
    seconds = number(line.get("time"))
    if not 0 <= seconds < 1e11:
        return MISSING
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _anomaly_tables(run: RunRecord) -> Iterator[DataTable]:
    if not run.anomalies:
        return
    shown = run.anomalies[-_MAX_ANOMALY_ROWS:]
    rows = [
        [
            whole(line.get("step")),
            str(line.get("kind")),
            decimal(number(line.get("value"))),
            decimal(number(line.get("limit"))),
            "applied" if line.get("action") == "warn" else "skipped",
            _worst_source(run, line),
        ]
        for line in shown
    ]
    headers = ["step", "kind", "value", "limit", "update", "source with the highest loss"]
    note = f"The last {_MAX_ANOMALY_ROWS} of {len(run.anomalies):,}." if len(run.anomalies) > _MAX_ANOMALY_ROWS else ""
    yield DataTable("Bad steps", headers, rows, frozenset({1, 4, 5}), note)
    documents = [row for line in shown[-5:] for row in _document_rows(line)]
    unknown = [line for line in shown if line.get("samples_unknown")]
    if documents:
        headers = ["step", "source", "file", "epoch", "documents"]
        yield DataTable("Documents of the bad steps", headers, documents, frozenset({1, 2, 4}), _documents_note(shown))
    elif unknown:
        reasons = [[whole(line.get("step")), str(line["samples_unknown"])] for line in unknown[-5:]]
        yield DataTable("Documents of the bad steps", ["step", "unknown, because"], reasons, frozenset({1}))


def _documents_note(lines: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"Of the last {min(len(lines), 5)} bad steps, at most {_MAX_SAMPLES} samples each, from the source with the "
        "highest loss first; anomalies.jsonl has all of them."
    )


def _losses(line: Mapping[str, Any]) -> dict[str, float]:
    known = {name: number(loss) for name, loss in as_mapping(line.get("loss_by_source")).items()}
    return {name: loss for name, loss in known.items() if math.isfinite(loss)}


def _worst_source(run: RunRecord, line: Mapping[str, Any]) -> str:
    losses = _losses(line)
    if not losses:
        return MISSING
    worst = max(losses, key=lambda name: losses[name])
    return f"{worst} ({signed(losses[worst], 3).lstrip('+')})"


def _document_rows(line: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the samples of a bad step, first from the source with the highest loss."""
    samples = line.get("samples")
    if not isinstance(samples, list):
        return
    losses = _losses(line)
    named = [as_mapping(sample) for sample in samples]
    named.sort(key=lambda sample: -losses.get(str(sample.get("source")), -math.inf))
    for sample in named[:_MAX_SAMPLES]:
        documents = sample.get("documents")
        numbers = list(map(str, documents)) if isinstance(documents, list) else []
        shown = ", ".join(numbers[:_MAX_DOCUMENTS])
        rest = len(numbers) - _MAX_DOCUMENTS
        yield [
            whole(line.get("step")),
            str(sample.get("source")),
            str(sample.get("prefix")),
            whole(sample.get("epoch")),
            f"{shown} and {rest} more" if rest > 0 else shown,
        ]
