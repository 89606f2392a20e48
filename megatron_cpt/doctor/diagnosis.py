"""What a check found, and how it is shown."""

from __future__ import annotations

import enum
from dataclasses import dataclass


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
class Diagnosis:
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


def passed(check: str, found: str) -> Diagnosis:
    """Nothing is wrong."""
    return Diagnosis(check, Level.OK, found)
