"""Timed steps of one loop: this project's trainer, or a function that trains one step."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from benchmarks.gpu.busy import PROFILED_STEPS, StepProfile, synchronize
from benchmarks.gpu.measured import Report
from benchmarks.gpu.workload import WARM_UP, StepClock, report_speed, train
from megatron_cpt.config import RunConfig


class ProfiledClock(StepClock):
    """Clock whose last two steps are profiled and not timed."""

    def __init__(self, last_timed: int) -> None:
        super().__init__()
        self._last_timed = last_timed
        self.profile = StepProfile()

    def on_step(self, session: Any) -> None:
        """Time a step, or profile the steps after the last timed one."""
        step = session.state.step
        if step <= self._last_timed:
            super().on_step(session)
        if step == self._last_timed:
            self.profile.begin()
        if step == self._last_timed + PROFILED_STEPS:
            self.profile.end()


def time_trainer(report: Report, run: RunConfig, *, steps: int) -> None:
    """Report the steps of this project's trainer; the run needs `WARM_UP + steps + PROFILED_STEPS` steps."""
    clock = ProfiledClock(WARM_UP + steps)
    train(run, [clock, MachineState(report)])
    report_speed(report, run, clock.seconds[WARM_UP:])
    report_memory(report)
    clock.profile.report(report)


class MachineState(StepClock):
    """Hook that reports the layers and the knobs of the run."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def on_start(self, session: Any) -> None:
        """Report before the first step."""
        self._report.note(layers=session.model.layers, speed=sorted(session.model.knobs))


def time_function(report: Report, run: RunConfig, step: Callable[[], Any], *, steps: int) -> None:
    """Report the steps of a loop; every loop ends a step with its gradient norm or its loss on the host."""
    times = []
    for _ in range(WARM_UP + steps + 1):
        times.append(time.perf_counter())
        step()
    times.append(time.perf_counter())
    seconds = [end - start for start, end in pairwise(times)]
    report_speed(report, run, seconds[WARM_UP:-1])
    report_memory(report)
    profile = StepProfile()
    profile.begin()
    for _ in range(PROFILED_STEPS):
        step()
    profile.end()
    profile.report(report)


def report_memory(report: Report) -> None:
    """Report the peak of torch's allocator."""
    synchronize()
    if torch.cuda.is_available():
        report.note(
            peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30,
            reserved_memory_gib=torch.cuda.max_memory_reserved() / 2**30,
        )
