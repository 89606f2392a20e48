"""Progress bar of long commands, on stderr and only on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Function that advances the bar by an amount; a new total replaces the previous one."""

    def __call__(self, amount: int, total: int | None = None) -> None:
        """Advance the bar."""


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Advance]:
    """Show the progress of a command.

    Args:
        what: label of the bar, such as `checking`.
        total: final amount, in any unit; None: not known yet.

    Yields:
        A function that advances the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, highlight=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(amount: int, total: int | None = None) -> None:
            bar.update(task, advance=amount, total=total)

        yield advance
