"""Share of a step in which the GPU is busy, from a torch profile of two steps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.gpu.measured import Report

PROFILED_STEPS = 2
TOP_KERNELS = 60
SYNCHRONIZATIONS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class StepProfile:
    """Profile between `begin` and `end`. The profiler slows the host, so the busy share is a lower bound."""

    def __init__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._seconds = 0.0

    def begin(self) -> None:
        """Start the profile on an idle GPU."""
        synchronize()
        self._profile.__enter__()
        self._seconds = -time.perf_counter()

    def end(self) -> None:
        """Wait for the GPU and stop the profile."""
        synchronize()
        self._seconds += time.perf_counter()
        self._profile.__exit__(None, None, None)

    def report(self, report: Report) -> None:
        """Report the busy share, the host synchronizations per step, and the kernels that take longest."""
        events: list[Any] = list(self._profile.events())
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        synchronizations = sum(event.name in SYNCHRONIZATIONS for event in events)
        report.note(
            profiled_step_seconds=self._seconds / PROFILED_STEPS,
            host_synchronizations_per_step=synchronizations / PROFILED_STEPS if kernels else None,
            gpu_busy_share=busy_seconds((e.time_range.start, e.time_range.end) for e in kernels) / 1e6 / self._seconds
            if kernels
            else None,
        )
        milliseconds = Counter[str]()
        for event in kernels:
            milliseconds[event.name] += (event.time_range.end - event.time_range.start) / 1e3 / PROFILED_STEPS
        report.note(kernel_milliseconds_per_step=dict(milliseconds.most_common(TOP_KERNELS)))


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals, in their unit.

    Example: (0, 3), (1, 2), (2, 5), (7, 8) cover 6.
    """
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def synchronize() -> None:
    """Wait for the GPU; a CPU has nothing to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
