"""Progress of long commands, on stderr: a bar on a terminal, else a line per minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_cpt.files.system_errors import print_now

_LINE_SECONDS = 60.0


@contextmanager
def progress_bar(what: str, total: int | None = None, *, is_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """Show the progress of a command: a bar on a terminal, else a line per minute, for the log of a job.

    Args:
        what: label of the bar, such as `checking`.
        total: final amount, in any unit; None: not known yet.
        is_bytes: the amounts are bytes; the bar shows them, and the speed.

    Yields:
        advance(amount since the last call, new total or None), which any thread may call.
    """
    from rich import progress

    from megatron_cpt.views.terminal_console import TerminalConsole

    console = TerminalConsole(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(what, total, is_bytes=is_bytes)
        return
    columns = [progress.TextColumn("{task.description}", markup=False), progress.BarColumn()]
    columns += [progress.DownloadColumn(), progress.TransferSpeedColumn()] if is_bytes else []
    columns.append(progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount, total=None: bar.update(task, advance=amount, total=total)


def print_note(text: str) -> None:
    """Tell the user on stderr what a command is doing, above its bar on a terminal."""
    if sys.stderr.isatty():
        print(f"note: {text}", file=sys.stderr, flush=True)
    else:
        print_now(f"note: {text}")


class ProgressLines:
    """Progress as lines such as `evaluating: 240 of 2,400 (10%), 9m12s left`, at most one per minute.

    Args:
        what, total, is_bytes: as in `progress_bar`.
    """

    def __init__(self, what: str, total: int | None, *, is_bytes: bool) -> None:
        self._what, self._total, self._is_bytes = what, total, is_bytes
        self._done = self._done_at_line = 0
        self._time_of_line = time.monotonic()

    def __call__(self, amount: int, total: int | None = None) -> None:
        """Add an amount, and print a line if one is due."""
        self._done += amount
        self._total = total or self._total
        seconds = time.monotonic() - self._time_of_line
        if seconds >= _LINE_SECONDS and self._total:
            print_now(f"{self._what}: {self._text(seconds, self._total)}")
            self._done_at_line = self._done
            self._time_of_line += seconds

    def _text(self, seconds: float, total: int) -> str:
        from megatron_cpt.config import format_duration

        unit, divisor = (" MB", 1e6) if self._is_bytes else ("", 1)
        found = f"{self._done / divisor:,.0f} of {total / divisor:,.0f}{unit} ({self._done / total:.0%})"
        if new := self._done - self._done_at_line:
            found += f", {format_duration(round((total - self._done) * seconds / new))} left"
        return found


@contextmanager
def described_progress() -> Iterator[tuple[Callable[[int, int, str], None], Callable[[str], None]]]:
    """Show the progress of a command with a text of its own, such as amounts and speeds.

    Yields:
        show(amount done, final amount, text) and notify(text), which prints a note above the bar.
    """
    from rich import progress

    from megatron_cpt.views.terminal_console import TerminalConsole

    console = TerminalConsole(stderr=True)
    columns = (
        progress.BarColumn(),
        progress.TextColumn("{task.percentage:.0f}% {task.fields[found]}", markup=False),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, found="")
        yield (
            lambda done, total, text: bar.update(task, completed=done, total=total, found=text),
            lambda text: console.print(f"note: {text}", soft_wrap=True),
        )


class Rates:
    """Amounts per second since the first call; a resumed command starts above 0."""

    def __init__(self) -> None:
        self._first: tuple[float, tuple[int, ...]] | None = None

    def since_first(self, *amounts: int) -> list[float]:
        """Return the rate of each amount."""
        now = time.monotonic()
        self._first = self._first or (now, amounts)
        seconds = max(now - self._first[0], 1e-9)
        return [(amount - first) / seconds for amount, first in zip(amounts, self._first[1], strict=True)]
