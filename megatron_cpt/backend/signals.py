"""Signals that ask a run to stop. The handler only records them; the training loop acts at the end of a step.

A second signal does not interrupt the save that the first one caused.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: SLURM's usual warning before the time limit


class StopRequest:
    """Last stop signal of this process, or None. The training step makes all ranks agree on stopping."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def handle_signal(self, number: int, _frame: FrameType | None) -> None:
        """Record a signal."""
        self.received = signal.Signals(number)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Handle the stop signals inside the block; restore the earlier handlers after it."""
    request = StopRequest()
    earlier = {number: signal.signal(number, request.handle_signal) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
