"""Progress bar of long commands, on stderr and only on a terminal."""

from __future__ import annotations

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
