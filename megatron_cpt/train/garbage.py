"""Garbage collection at fixed steps, so that all ranks pause at the same time."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

COLLECT_EVERY = 100
"""Steps between two collections; reference counts free everything but cycles at once."""


@contextlib.contextmanager
def manual_collection() -> Iterator[None]:
    """Turn automatic garbage collection off, and restore it at the end.

    Python collects when a rank has made enough objects. Each pause lasts as long as a small step and delays all other
    ranks, at other times on each rank. Megatron-LM has `--manual-gc` for this reason.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
