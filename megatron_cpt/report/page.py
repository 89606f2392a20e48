"""Parts of a report, without any markup: sections of sentences, tables and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MISSING = "–"


@dataclass(frozen=True)
class DataTable:
    """Table of texts; the first column names the row.

    Attributes:
        text_columns: columns after the first one that hold text and are aligned on the left.
        note: a sentence below the table.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: frozenset[int] = frozenset()
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One line of a chart; None: no value at that step. `errors` are standard errors of the values."""

    label: str
    values: Sequence[float | None]
    errors: Sequence[float | None] | None = None


@dataclass(frozen=True)
class CurveChart:
    """Chart of curves over the steps of a run.

    Attributes:
        key: id of the chart in the page.
        summary: sentence for readers who do not see the chart.
        steps: of the values of every curve.
        switches: (last step of a phase, name of the next one).
        flags: (step, text) of single events, such as a spike.
        has_points: the values are few measurements, each drawn as a point.
        may_coincide: the curves are of several runs and may cover each other.
    """

    key: str
    title: str
    unit: str
    summary: str
    steps: Sequence[int]
    curves: Sequence[Curve]
    switches: Sequence[tuple[int, str]] = ()
    flags: Sequence[tuple[int, str]] = ()
    has_points: bool = False
    may_coincide: bool = False


@dataclass(frozen=True)
class ChangeChart:
    """Dots on a line with zero in its middle: one row per source, one dot per run; to the left is better.

    Attributes:
        rows: names of the rows.
        changes: by run, the change of each row; None: unknown.
        half_widths: by run, half the width of the interval around each change; None: unknown.
    """

    key: str
    title: str
    unit: str
    summary: str
    rows: Sequence[str]
    changes: Mapping[str, Sequence[float | None]]
    half_widths: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class PageSection:
    """Section of a report."""

    key: str
    title: str
    sentences: Sequence[str] = ()
    parts: Sequence[DataTable | CurveChart | ChangeChart] = ()


@dataclass(frozen=True)
class RunPage:
    """A report.

    Attributes:
        summary: the sentences that a reader in a hurry needs.
        notes: files and lines that could not be read.
        data: the numbers, as plain JSON values.
    """

    title: str
    subtitle: str
    summary: Sequence[str]
    sections: Sequence[PageSection]
    notes: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def plain_text(value: Any) -> str:
    """Return a text that can be written as UTF-8: names and paths on disk may hold anything."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return "".join(character if character.isprintable() else " " for character in text)


def decimal(value: float | None, digits: int = 4) -> str:
    """Return a number with fixed decimals, with a dash for an unknown one."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """Return a change with its sign."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as a percentage."""
    return MISSING if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def whole(value: Any) -> str:
    """Return a count with separators of thousands."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    return f"{round(value):,}"


def finite(value: float | None) -> float | None:
    """Return a number for JSON, where NaN and infinity do not exist, with six significant digits."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
