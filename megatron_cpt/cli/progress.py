"""Progress bar of long commands, on stderr and only on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int | None = None, *, is_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """Show the progress of a command.

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
    columns = [progress.TextColumn("{task.description}", markup=False), progress.BarColumn()]
    columns += [progress.DownloadColumn(), progress.TransferSpeedColumn()] if is_bytes else []
    columns.append(progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount, total=None: bar.update(task, advance=amount, total=total)


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
