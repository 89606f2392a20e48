"""Results of a GPU measurement: what was written, read back, and shown as tables."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.items import Item, Prediction

TAIL_LINES, TAIL_CHARACTERS = 40, 6000


def write_atomically(path: Path, text: str) -> None:
    """Replace a file; a reader sees the old or the new content."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_results(path: Path) -> dict[str, Any]:
    """Return the results of an earlier measurement."""
    try:
        results: dict[str, Any] = json.loads(path.read_bytes())
        statuses = [entry["status"] for entry in results["items"].values()]
        assert all(isinstance(status, str) for status in statuses)
        assert {"started", "is_rehearsal"} <= results.keys()
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        sys.exit(f"{path}: not the results of a measurement ({error!r}); remove it or choose another --out")
    return results


def read_logs(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the log of each item from log.txt; nothing if there is no such file."""
    if not path.exists():
        return {}
    headers = {log_header(key, entry.get("title", "")): key for key, entry in entries.items()}
    logs: dict[str, list[str]] = {}
    key = None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        key = headers.get(line.rstrip("\n"), key)
        if key is not None:
            logs.setdefault(key, []).append(line)
    return {key: "".join(lines) for key, lines in logs.items()}


def log_header(key: str, title: str) -> str:
    """Return the line above the log of an item in log.txt."""
    return f"===== {key} {title}"


def read_figures(path: Path) -> tuple[dict[str, Any], str]:
    """Return what an item has measured, and what is wrong with it."""
    try:
        figures = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, "it wrote no figures"
    except ValueError as error:
        return {}, f"its figures are not JSON: {error}"
    return (figures, "") if isinstance(figures, dict) else ({}, "its figures are not a JSON object")


def read_tail(path: Path) -> list[str]:
    """Return the last lines of a log, whatever its bytes are."""
    text = path.read_bytes()[-TAIL_CHARACTERS:].decode(errors="replace")
    return text.splitlines()[-TAIL_LINES:]


def describe_status(status: int, tail: Sequence[str]) -> str:
    """Return how a process ended, with the last line of its log."""
    last = next((line.strip()[:300] for line in reversed(tail) if line.strip()), "")
    if status >= 0:
        return f"exit status {status}: {last}"
    memory = "; the system may be out of memory" if -status == signal.SIGKILL else ""
    return f"ended by {signal.Signals(-status).name}{memory}"


def summarize(results: dict[str, Any]) -> str:
    """Return the results as two tables in Markdown: items with their figures, predictions with their verdicts."""
    probe = results["items"].get("0", {}).get("figures") or {}
    what = "Rehearsal at toy width on a CPU; its figures say nothing about a GPU." if results["is_rehearsal"] else ""
    lines = [f"# GPU measurement of {results['started']}", "", what, f"Device: {probe.get('device', 'not probed')}", ""]
    lines += ["| item | status | seconds | expected | figures |", "| --- | --- | --- | --- | --- |"]
    for key, entry in results["items"].items():
        figures = ", ".join(f"{name} {_short(value)}" for name, value in (entry.get("figures") or {}).items())
        text = "; ".join(filter(None, [entry.get("reason", ""), figures])).replace("|", "/")
        cells = (f"{key} {entry['title']}", entry["status"], entry.get("seconds", ""), f"{entry['expected']:g}", text)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| prediction | bound | measured | verdict |", "| --- | --- | --- | --- |"]
    for entry in results["predictions"]:
        value = "" if entry["value"] is None else f"{entry['value']:.4g}"
        lines.append(f"| {entry['text']} ({entry['figure']}) | {entry['bounds']} | {value} | {entry['verdict']} |")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    """Return a figure in a few characters."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g})"
    if isinstance(value, dict | list):
        return f"{len(value)} rows"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(items: Sequence[Item], predictions: Sequence[Prediction], *, budget: float) -> None:
    """Print the items with their seconds and their predictions, and whether the budget suffices for all."""
    for item in items:
        print(f"{item.key:3} {item.expected:4g} s, limit {item.limit:4g} s  {item.title}")
        for prediction in predictions:
            if prediction.item == item.key:
                print(f"{'':25}{prediction.text}: {prediction.bounds}")
    expected = sum(item.expected for item in items)
    excess = f"; a budget of {budget:g} s may skip the last items, --resume measures them" if expected > budget else ""
    print(f"{'':3} {expected:4g} s expected in all{excess}")
