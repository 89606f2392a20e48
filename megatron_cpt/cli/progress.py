"""A progress bar for commands that read much: on stderr, and only where someone looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Counts on by an amount; a total replaces the one before."""

    def __call__(self, amount: int, total: int | None = None) -> None:
        """Count on."""


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Advance]:
    """Show how far a command is; stdout and log files stay clean.

    Args:
        what: what is being done, in a word or two.
        total: of whatever is counted; None: not known yet.

    Yields:
        What counts on.
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
