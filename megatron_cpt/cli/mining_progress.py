"""Progress bar of `mine`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from megatron_cpt.cli.progress import Rates, described_progress


@contextlib.contextmanager
def mining_progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Show a bar with documents per second and time left on stderr, if stderr is a terminal.

    Yields:
        The `progress` and `notify` of `MiningOptions`.
    """
    from megatron_cpt.config import format_count

    rates = Rates()
    with described_progress() as (show, notify):

        def describe(done: int, total: int) -> None:
            (speed,) = rates.since_first(done)
            show(done, total, f"{format_count(done)} documents, {format_count(speed)} documents/s")

        yield describe, notify
