"""`megatron-cpt train` of a 1.1B for 40 steps with asynchronous saves, then a short run with synchronous ones.

    python -m benchmarks.gpu.train_1b

The stall of a save is the time by which the steps from its start to its publication exceed the median of undisturbed
steps.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.gpu.measured import Report, run_item
from megatron_cpt.hooks import Hook

EVERY = 15


class SaveClock(Hook):
    """Times of steps and of published checkpoints; `log.hooks` creates it without arguments."""

    latest: ClassVar[SaveClock]

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.published: list[float] = []
        SaveClock.latest = self

    def on_start(self, session: Any) -> None:
        """Note the start of the first step."""
        self.ends.append(time.perf_counter())

    def on_step(self, session: Any) -> None:
        """Note the end of a step."""
        self.ends.append(time.perf_counter())

    def on_checkpoint(self, session: Any, path: str) -> None:
        """Note the publication of a checkpoint."""
        self.published.append(time.perf_counter())


def split_steps(
    ends: list[float], published: list[float], *, every: int, warm_up: int
) -> tuple[list[float], list[list[float]]]:
    """Return the seconds of undisturbed steps, and for each save the seconds of the steps that it may disturb.

    Args:
        ends: start of the first step, then the end of each step.
        published: times at which checkpoints were published.
        every: steps between saves; the save of step k starts after `ends[k]`.
        warm_up: steps that count for neither.
    """
    seconds = [end - start for start, end in pairwise(ends)]
    disturbed: list[list[float]] = []
    taken: set[int] = set()
    for step, time_published in zip(range(every, len(seconds), every), published, strict=False):
        # The first step that ends after the publication may still have run beside the write.
        last = next((n for n in range(step, len(seconds)) if ends[n + 1] >= time_published), len(seconds) - 1)
        disturbed.append(seconds[step : last + 1])
        taken |= set(range(step, last + 1))
    return [each for n, each in enumerate(seconds) if n >= warm_up and n not in taken], disturbed


def stall(undisturbed: list[float], disturbed: list[float]) -> float:
    """Return the seconds that a save cost the steps beside it."""
    return max(0.0, sum(disturbed) - len(disturbed) * statistics.median(undisturbed))


def measure(report: Report) -> None:
    """Run the command twice in this process."""
    from benchmarks.gpu.workload import WARM_UP, adviser_estimate, config_of, one_billion_run, report_speed
    from megatron_cpt.planning.cost.memory import GIB

    every, steps = (3, 12) if report.is_rehearsal else (EVERY, 40)
    warm_up = min(WARM_UP, every - 1)
    for name, in_background, count in (("async", True, steps), ("sync", False, every + 4)):
        run = one_billion_run(
            report,
            steps=count,
            output=str(report.memory / name),
            checkpoint={"every": every, "keep": 1, "async": in_background, **_no_final_save()},
            log={"every": 1, "hooks": ["benchmarks.gpu.train_1b:SaveClock"]},
        )
        started = time.perf_counter()
        _train(report.work / f"{name}.yaml", run)
        clock = _latest_clock()
        undisturbed, disturbed = split_steps(clock.ends, clock.published, every=every, warm_up=warm_up)
        stalls = [stall(undisturbed, steps_beside) for steps_beside in disturbed]
        if stalls:
            report.repeated(f"{name}_stall_seconds", stalls)
        if name == "sync":
            continue
        config = config_of(run)
        report.note(startup_seconds=clock.ends[0] - started)
        report_speed(report, config, undisturbed)
        lines = _metrics(Path(config.output))
        _report_waits(report, lines)
        estimate, peak = adviser_estimate(config), lines[-1]["peak_memory_gib"]
        report.note(peak_memory_gib=peak)
        if estimate is not None:
            planned = (estimate.memory.total - estimate.memory.reserved) / GIB
            report.note(planned_memory_gib=planned, memory_over_plan=peak / planned)


def _no_final_save() -> dict[str, Any]:
    from benchmarks.gpu.workload import without_final_save

    return without_final_save()


def _latest_clock() -> Any:
    """Return the clock of the last run, which `log.hooks` has imported under the module's own name."""
    from benchmarks.gpu import train_1b

    return train_1b.SaveClock.latest


def _train(path: Path, run: dict[str, Any]) -> None:
    """Run the command in this process, whose imports are done."""
    import yaml

    from megatron_cpt.cli import main

    path.write_text(yaml.safe_dump(run))
    status = main(["train", str(path)])
    if status != 0:
        raise RuntimeError(f"megatron-cpt train {path.name}: exit status {status}")


def _metrics(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _report_waits(report: Report, lines: list[dict[str, Any]]) -> None:
    """Report the waits that metrics.jsonl has, and the share of a step that waits for data."""
    for key in ("step_seconds", "data_wait_seconds", "sync_wait_seconds", "reserved_memory_gib"):
        values = [line[key] for line in lines if line.get(key) is not None]
        if values:
            report.repeated(f"metrics_{key}", values)
    if "metrics_data_wait_seconds" in report.figures and "metrics_step_seconds" in report.figures:
        medians = [report.figures[f"metrics_{key}_seconds"]["median"] for key in ("data_wait", "step")]
        report.note(data_wait_share=medians[0] / medians[1])


IMPORTS = ("benchmarks.gpu.trainer_imports", "megatron_cpt.cli")

if __name__ == "__main__":
    sys.exit(run_item(measure, imports=IMPORTS))
