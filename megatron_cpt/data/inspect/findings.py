"""Findings of the validation of a dataset, one line per finding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

MOST_NAMED = 5
"""Findings of one kind that are listed one by one; the others are only counted."""


@dataclass(frozen=True)
class Finding:
    """Fault or warning about a dataset.

    Attributes:
        level: a `fault` makes the dataset invalid; a `warning` does not.
        kind: short identifier of the kind of problem, for programs.
        place: position in the file, such as `sequence 17`; empty: the complete file.
        value: invalid value at that position; None if there is no single value.
    """

    level: Literal["fault", "warning"]
    kind: str
    file: str
    place: str
    value: int | str | None
    problem: str

    def __str__(self) -> str:
        position = f"{self.file}: {self.place}" if self.place else self.file
        return f"{position}: {self.problem}"


def fault(kind: str, file: str, problem: str, *, place: str = "", value: int | str | None = None) -> Finding:
    """Return a finding that makes the dataset invalid."""
    return Finding("fault", kind, file, place, value, problem)


def listed(
    level: Literal["fault", "warning"], kind: str, file: str, total: int, named: Sequence[tuple[str, int, str]]
) -> Iterator[Finding]:
    """Yield the findings of one kind: the first few (place, value, problem), and one with the number of the others."""
    for place, value, problem in named:
        yield Finding(level, kind, file, place, value, problem)
    if (others := total - len(named)) > 0:
        yield Finding(level, kind, file, "", total, f"{others:,} more of this kind, {total:,} in total")
