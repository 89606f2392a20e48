"""Limit on the run time of a process, by a clock that the test sets."""

from __future__ import annotations

import time

import psutil

from megatron_cpt.backend.process_age import seconds_since_process_start
from megatron_cpt.train.resilience.wall_time import WallTime


class Clock:
    """Clock that only the test advances."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def run(limit: float | None, steps: list[float], *, start: float = 0.0, save: float = 0.0, every: int = 0) -> int:
    """Return the number of steps that a loop does; it saves at its end and every `every` steps."""
    clock = Clock(start)
    wall_time = WallTime(limit, clock)
    for number, seconds in enumerate(steps, start=1):
        wall_time.begin_step()
        clock.now += seconds
        is_save_due = every > 0 and number % every == 0
        is_last = wall_time.is_last_step(is_save_due=is_save_due)
        if is_last or is_save_due:
            wall_time.begin_save()
            clock.now += save
            wall_time.end_stall()
            wall_time.end_save()
        wall_time.end_step()
        if is_last:
            assert clock.now <= (limit or 0.0)
            return number
    return len(steps)


def test_it_stops_with_the_last_step_that_fits():
    # after step k 10 k seconds are over; step 10 would end at 100, at the limit of 100 it just fits
    assert run(100, [10] * 20) == 10
    assert run(99, [10] * 20) == 9


def test_what_was_before_training_counts():
    assert run(100, [10] * 20, start=35) == 6


def test_it_leaves_room_for_a_save_as_slow_as_the_slowest():
    # 4 steps and 2 saves are 70 s, one more step and its save 95 s
    assert run(100, [10] * 20, save=15, every=2) == 5
    assert run(95, [10] * 20, save=15, every=2) == 5
    assert run(94, [10] * 20, save=15, every=2) == 4


def test_the_slowest_of_the_recent_steps_is_what_the_next_may_take():
    # step 11 begins at 130: it and another one may take 80 s
    assert run(200, [10, 10, 40, *[10] * 20]) == 11
    assert run(2000, [40, *[10] * 300]) > 150, "a slow step long ago is forgotten"


def test_without_a_limit_it_never_stops():
    assert run(None, [1e6] * 5) == 5


def test_a_save_in_the_background_counts_with_all_its_time_but_slows_no_step():
    clock = Clock()
    wall_time = WallTime(100, clock)
    wall_time.begin_step()
    clock.now = 10
    wall_time.begin_save()
    clock.now = 11
    wall_time.end_stall()
    wall_time.end_step()  # 10 s without the second that it stood still
    wall_time.begin_step()
    clock.now = 41
    wall_time.end_save()  # 31 s after it began
    wall_time.end_step()  # 30 s
    wall_time.begin_step()  # at 41: two steps of 30 s and a save of 31 s do not fit
    assert wall_time.is_last_step()
    roomy = WallTime(200, clock)
    assert not roomy.is_last_step()


def test_the_last_save_waits_for_one_in_the_background():
    wall_time = WallTime(100, clock := Clock())

    def save_from(begin: float, end: float | None) -> None:
        clock.now = begin
        wall_time.begin_save()
        wall_time.end_stall()
        if end is not None:
            clock.now = end
            wall_time.end_save()

    def is_last_step_at(begin: float) -> bool:
        clock.now = begin
        wall_time.begin_step()
        clock.now += 1
        is_last = wall_time.is_last_step()
        wall_time.end_step()
        return is_last

    save_from(0, 30)
    save_from(39, None)  # takes until 69, and the last one from there until 99
    assert not is_last_step_at(40)
    save_from(41, None)  # until 71, and the last one until 101
    assert is_last_step_at(42)


def test_a_first_save_in_the_background_takes_at_least_as_long_as_it_has_taken():
    wall_time = WallTime(100, clock := Clock())
    wall_time.begin_save()
    wall_time.end_stall()
    for begin, is_last in ((44, False), (54, True)):  # so far 45 s and 55 s: as many again would end at 90 and at 110
        clock.now = begin
        wall_time.begin_step()
        clock.now += 1
        assert wall_time.is_last_step() == is_last
        wall_time.end_step()


def test_the_first_step_is_judged_by_what_is_known_of_it():
    clock = Clock(50)
    wall_time = WallTime(100, clock)
    wall_time.begin_step()
    clock.now = 76
    assert wall_time.is_last_step()


def test_the_age_of_a_process_does_not_depend_on_the_date(monkeypatch):
    before = seconds_since_process_start()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    after = seconds_since_process_start()
    process = psutil.Process()
    assert 0 < before <= after
    monkeypatch.undo()
    assert abs(time.time() - process.create_time() - seconds_since_process_start()) < 1.0


def test_an_evaluation_is_no_step_but_needs_room():
    clock = Clock()
    wall_time = WallTime(100, clock)
    for _ in range(2):
        wall_time.begin_step()
        clock.now += 10
        wall_time.begin_evaluation()
        clock.now += 15
        wall_time.end_evaluation()
        wall_time.end_step()
    wall_time.begin_step()  # at 50: this step and the next one end at 70, an evaluation after them at 85
    assert not wall_time.is_last_step(is_evaluation_due=True)
    clock.now = 70.0
    wall_time.begin_step()
    assert not wall_time.is_last_step()
    assert wall_time.is_last_step(is_evaluation_due=True)
