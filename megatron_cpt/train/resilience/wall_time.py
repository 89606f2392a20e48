"""Limit on the run time of a process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from megatron_cpt.backend.process_age import seconds_since_process_start

_RECENT = 64  # steps of which the slowest is taken


class WallTime:
    """Decision when to stop so that the last checkpoint is still written in time.

    The running step and the next one are assumed to take as long as the slowest recent step, and the save as long as
    the slowest save so far. Example: with a limit of 100 s, steps of 11 s and saves of 5 s, the step that begins at
    74 s is the last one, because the next step and its save would end at 74 + 2 x 11 + 5 = 101 s.

    Before the first save of this process its duration is unknown, so set the limit some minutes below the scheduler's.

    Args:
        limit: seconds; None: no limit.
        clock: returns the seconds since the process started.
    """

    def __init__(self, limit: float | None, clock: Callable[[], float] = seconds_since_process_start) -> None:
        self._limit, self._clock = limit, clock
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._slowest_save = self._slowest_evaluation = self._evaluation_begin = 0.0
        self._step_begin = self._saving = self._save_begin = 0.0
        self._is_saving = False

    def begin_step(self) -> None:
        """Note the time at which a step begins."""
        self._step_begin, self._saving = self._clock(), 0.0

    def begin_save(self) -> None:
        """Note the time at which a save begins."""
        self._save_begin, self._is_saving = self._clock(), True

    def end_stall(self) -> None:
        """Note that training continues after `begin_save`; the time in between does not count as time of the step."""
        self._saving += self._clock() - self._save_begin

    def end_save(self) -> None:
        """Note that the checkpoint is published: immediately, or some steps later from the background."""
        self._slowest_save = max(self._slowest_save, self._clock() - self._save_begin)
        self._is_saving = False

    def end_step(self) -> None:
        """Note the end of a step, including validation and reports but neither saving nor an evaluation."""
        self._recent.append(self._clock() - self._step_begin - self._saving)

    def begin_evaluation(self) -> None:
        """Note the time at which an evaluation begins."""
        self._evaluation_begin = self._clock()

    def end_evaluation(self) -> None:
        """Note that training continues; an evaluation does not count as time of the step."""
        seconds = self._clock() - self._evaluation_begin
        self._saving += seconds
        self._slowest_evaluation = max(self._slowest_evaluation, seconds)

    def is_last_step(self, *, is_save_due: bool = False, is_evaluation_due: bool = False) -> bool:
        """Return whether the step after the running one would not fit into the limit.

        Args:
            is_save_due: whether a save follows the running step before the next step begins.
            is_evaluation_due: whether an evaluation follows the running step or the next one.
        """
        if self._limit is None:
            return False
        slowest = max(self._recent, default=self._clock() - self._step_begin)
        end, save = self._step_begin + 2 * slowest, self._slowest_save
        end += self._slowest_evaluation if is_evaluation_due else 0.0
        if self._is_saving:  # in the background: the next save waits for it
            save = max(save, self._clock() - self._save_begin)
            end = max(end, self._save_begin + save)
        return end + (2 if is_save_due else 1) * save > self._limit
