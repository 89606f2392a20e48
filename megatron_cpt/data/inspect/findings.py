"""Findings of the validation of a dataset, one line per finding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

MOST_NAMED = 5
"""Findings of one kind that are listed one by one; the others are only counted."""


@dataclass(frozen=True)
class Finding:
    """Fault or warning about a dataset.

    Attributes:
        level: a `fault` makes the dataset invalid; a `warning` does not.
        kind: short identifier of the kind of problem, for programs.
        file: path of the file.
        place: position in the file, such as `sequence 17`; empty: the complete file.
        value: invalid value at that position; None if there is no single value.
        problem: description of the problem.
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def fault(kind: str, file: str, problem: str, *, place: str = "", value: int | str | None = None) -> Finding:
    """Return a finding that makes the dataset invalid."""
    return Finding("fault", kind, file, place, value, problem)


def listed(
    level: Literal["fault", "warning"],
    kind: str,
    file: str,
    total: int,
    named: Iterable[tuple[str, int, str]],
) -> Iterator[Finding]:
    """Yield the findings of one kind: the first few one by one, and one finding with the number of the others.

    Args:
        level: see `Finding`, as for `kind` and `file`.
        total: number of findings.
        named: place, value and problem of the first few.
    """
    count = 0
    for place, value, problem in named:
        count += 1
        yield Finding(level, kind, file, place, value, problem)
    if total > count:
        yield Finding(level, kind, file, "", total, f"{total - count:,} more of this kind, {total:,} in total")
