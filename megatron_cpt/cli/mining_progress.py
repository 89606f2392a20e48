"""Progress bar of `mine`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def mining_progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Show a bar with documents per second and time left on stderr, if stderr is a terminal.

    Yields:
        The `progress` and `notify` of `MiningOptions`.
    """
    from rich import progress as rich_progress

    from megatron_cpt.config import format_count
    from megatron_cpt.views.terminal_console import TerminalConsole

    console = TerminalConsole(stderr=True)
    columns = (
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.percentage:.0f}% {task.fields[found]}", markup=False),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("mining", total=None, found="")
        first: list[tuple[float, int]] = []  # (time, documents): a resumed run starts above 0

        def show(done: int, total: int) -> None:
            now = time.monotonic()
            first[:] = first or [(now, done)]
            speed = (done - first[0][1]) / max(now - first[0][0], 1e-9)
            found = f"{format_count(done)} documents, {format_count(speed)} documents/s"
            bar.update(task, completed=done, total=total, found=found)

        yield show, lambda text: console.print(f"note: {text}", soft_wrap=True)
