"""Signals that ask a run to stop: noted when they come, acted on at the end of a step.

A second signal is noted like the first: a save that is under way is finished.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: SLURM's usual warning before the time limit


class StopRequest:
    """Whether this process was asked to stop; the step makes all ranks agree."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler; does nothing but remember."""
        self.received = signal.Signals(number)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Handle the stop signals inside the block; the earlier handlers come back after it."""
    request = StopRequest()
    earlier = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
