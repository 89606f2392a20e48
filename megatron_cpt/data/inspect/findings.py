"""What `check` has to say about a data set, one line each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

MOST_NAMED = 5
"""Places that are named one by one; the rest are counted."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        level: a `fault` makes the data set unsound; a `warning` does not.
        kind: what sort of thing, for programs.
        file: which file.
        place: where in it, such as `sequence 17`; empty: the file as a whole.
        value: what was found there; None where there is no one value.
        problem: what is wrong with it.
    """

    level: Literal["fault", "warning"]
    kind: str
    file: str
    place: str
    value: int | str | None
    problem: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.place}" if self.place else self.file
        return f"{where}: {self.problem}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def fault(kind: str, file: str, problem: str, *, place: str = "", value: int | str | None = None) -> Finding:
    """A finding that makes the data set unsound."""
    return Finding("fault", kind, file, place, value, problem)


def warning(kind: str, file: str, problem: str, *, place: str = "", value: int | str | None = None) -> Finding:
    """A finding that is worth knowing."""
    return Finding("warning", kind, file, place, value, problem)


def listed(
    level: Literal["fault", "warning"],
    kind: str,
    file: str,
    total: int,
    named: Iterable[tuple[str, int, str]],
) -> Iterator[Finding]:
    """Many findings of one kind: the first few by place, the others by number.

    Args:
        level: see `Finding`.
        kind: see `Finding`.
        file: see `Finding`.
        total: how many there are.
        named: place, value and problem of the first ones.
    """
    count = 0
    for place, value, problem in named:
        count += 1
        yield Finding(level, kind, file, place, value, problem)
    if total > count:
        yield Finding(level, kind, file, "", total, f"the same in {total - count:,} more places, {total:,} in all")
