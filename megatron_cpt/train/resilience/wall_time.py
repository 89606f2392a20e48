"""How long a process may run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import psutil

_RECENT = 64  # steps that the slowest one is looked for in


def seconds_since_process_start() -> float:
    """Age of this process: imports and loading count, for the scheduler counts them too."""
    return time.time() - float(psutil.Process().create_time())


class WallTime:
    """Says when to stop so that a checkpoint is still written in time.

    A step is judged while it runs, from what was known when it began: it takes as long as the slowest of the recent
    ones, and so may the one after it, which must still leave room for a save as slow as the slowest so far. Before the
    first save of this process nothing is known about saving, so leave some room below the scheduler's own limit.

    Args:
        limit: seconds; None: no limit.
        clock: seconds since the process started.
    """

    def __init__(self, limit: float | None, clock: Callable[[], float] = seconds_since_process_start) -> None:
        self._limit, self._clock = limit, clock
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._slowest_save = 0.0
        self._begun = self._saving = self._save_begun = 0.0
        self._is_saving = False

    def begin_step(self) -> None:
        """Note the time at which a step begins."""
        self._begun, self._saving = self._clock(), 0.0

    def begin_save(self) -> None:
        """Note the time at which a save begins."""
        self._save_begun, self._is_saving = self._clock(), True

    def end_stall(self) -> None:
        """Training goes on after `begin_save`: the step is not counted as slow for it."""
        self._saving += self._clock() - self._save_begun

    def end_save(self) -> None:
        """The checkpoint is published, at once or, from the background, some steps later."""
        self._slowest_save = max(self._slowest_save, self._clock() - self._save_begun)
        self._is_saving = False

    def end_step(self) -> None:
        """Note the end of a step, with all that follows its update but saving."""
        self._recent.append(self._clock() - self._begun - self._saving)

    def is_last_step(self, *, is_save_due: bool = False) -> bool:
        """Whether the step after the running one would not fit.

        Args:
            is_save_due: the running step is followed by a save of its own before the next one.
        """
        if self._limit is None:
            return False
        slowest = max(self._recent, default=self._clock() - self._begun)
        end, save = self._begun + 2 * slowest, self._slowest_save
        if self._is_saving:  # in the background: the last save waits for that one
            save = max(save, self._clock() - self._save_begun)
            end = max(end, self._save_begun + save)
        return end + (2 if is_save_due else 1) * save > self._limit
