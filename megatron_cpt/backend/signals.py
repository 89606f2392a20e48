"""Signals that ask a run to stop: noted when they come, acted on at the end of a step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: SLURM's usual warning before the time limit


class StopRequest:
    """Whether some rank was asked to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler; does nothing but remember."""
        self.received = signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective call, so that all ranks stop after the same step."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.received is not None
        flag = torch.tensor([self.received is not None], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


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
