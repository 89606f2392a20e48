"""Process that belongs to one run: its signals, log messages and warnings.

The handler of a signal records it; the training loop acts at the end of a step. A second SIGTERM or SIGUSR1 does not
interrupt the save that the first one caused. A second SIGINT (Ctrl-C) ends the process at once.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from megatron_cpt.backend.distributed import launched_rank
from megatron_cpt.files.system_errors import print_now

# SIGUSR1: SLURM's usual warning before the time limit
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Last stop signal of this process, or None. The training step makes all ranks agree on stopping."""

    received: signal.Signals | None = None

    def handle_signal(self, number: int, _frame: FrameType | None) -> None:
        """Record a signal. After SIGINT its default action is restored, which also interrupts waiting in C."""
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if launched_rank() == 0:
                print_now("\nreceived SIGINT: saving after this step; press Ctrl-C again to end without saving")


@contextlib.contextmanager
def own_process() -> Iterator[StopRequest]:
    """Catch stop signals inside the block, print our log messages to stderr, and silence the libraries.

    Ranks other than the main one print errors only.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    ours = logging.getLogger("megatron_cpt")
    ours.setLevel(logging.INFO if launched_rank() == 0 else logging.ERROR)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        ours.addHandler(handler)
        ours.propagate = False
    for name in ("megatron", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)
    request = StopRequest()
    with _handlers(STOP_SIGNALS, request.handle_signal):
        yield request


@contextlib.contextmanager
def _handlers(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals inside the block, except ignored ones.

    A shell starts background jobs with SIGINT ignored, so that Ctrl-C for another job does not reach them; nohup starts
    its command with SIGHUP ignored.
    """
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    earlier = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def stops_as_interrupts() -> Iterator[None]:
    """Let the first stop signal end the block with KeyboardInterrupt, for commands that have no step to finish.

    Further signals are ignored, so that nothing interrupts the block's own clean-up. An error after the signal is most
    likely of a rank that has ended before this one; it becomes the same KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one may have handlers
        yield
        return
    is_received = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_received
        if not is_received:
            is_received = True
            raise KeyboardInterrupt

    with _handlers((*STOP_SIGNALS, signal.SIGHUP), interrupt):  # SIGHUP: the terminal is gone
        try:
            yield
        except BaseException:
            if is_received:
                raise KeyboardInterrupt from None
            raise
