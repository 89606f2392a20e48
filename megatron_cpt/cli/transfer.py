"""Sizes in bytes and progress bars in bytes, for commands that read and write weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_cpt.errors import UserError


def parse_size(option: str, text: str) -> int:
    """Return the number of bytes for `1GB`, `500MB` or a plain number.

    Raises:
        UserError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)[bB]?", text.strip())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError(f"{option} {text}: not a size; write 5GB, 500MB or a number of bytes")
    return size


@contextmanager
def transfer_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar with bytes and speed on stderr, if stderr is a terminal.

    Yields:
        advance(bytes since the last call, bytes in total), which any thread may call.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, markup=False, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)

        def advance(amount: int, total: int) -> None:
            bar.update(task, advance=amount, total=total)

        yield advance
