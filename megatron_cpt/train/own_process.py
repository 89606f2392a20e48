"""Signals, log messages and warnings of a process that belongs to one run."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

from megatron_cpt.backend import StopRequest, catch_stop_signals, launched_rank


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
    with catch_stop_signals() as stop:
        yield stop
