"""What a check found, and how it is shown."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.table import Table


class Level(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Costs speed, or a feature."""
    WARNING = "warning"
    """Will end or spoil runs sooner or later."""
    BLOCKS = "blocks"
    """No run can start."""


@dataclass(frozen=True)
class Finding:
    """One line of an examination.

    Attributes:
        check: what was looked at.
        level: how bad it is.
        found: the facts.
        cost: what it costs; empty where nothing is wrong.
        way_out: what to do about it.
    """

    check: str
    level: Level
    found: str
    cost: str = ""
    way_out: str = ""


def sound(check: str, found: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check, Level.OK, found)


def render(findings: Sequence[Finding], out: TextIO) -> None:
    """A table of them, the lines that say what to do below what they are about."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        lines = [line for line in (finding.found, finding.cost, finding.way_out) if line]
        table.add_row(finding.level.value, finding.check, "\n".join(lines))
    console = Console(file=out, markup=False, highlight=False, width=None if out.isatty() else 120)
    console.print(table)
    blocking = sum(finding.level is Level.BLOCKS for finding in findings)
    warnings = sum(finding.level is Level.WARNING for finding in findings)
    console.print(f"\n{blocking} of {len(findings)} checks block a run, {warnings} warn")
