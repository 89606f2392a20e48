"""Result of one check."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.StrEnum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    """The run is slower, or a feature is missing."""
    WARNING = "warning"
    """The run may fail, or give wrong results."""
    BLOCKS = "blocks"
    """The run cannot start."""


@dataclass(frozen=True)
class Diagnosis:
    """Result of one check. The field names are the keys of `doctor --json`.

    Attributes:
        check: name of the check, such as `open files`.
        level: severity.
        found: the facts, such as `1,024`.
        cost: effect on a run; empty if there is no problem.
        way_out: how to fix the problem.
    """

    check: str
    level: Level
    found: str
    cost: str = ""
    way_out: str = ""


def passed(check: str, found: str) -> Diagnosis:
    """Return a finding without a problem."""
    return Diagnosis(check, Level.OK, found)
