"""The tests of one file of tests/gpu in parallel on one GPU; each outcome is a figure as soon as its test ends.

python -m benchmarks.gpu.gpu_tests --file=test_layers
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from typing import Any

from benchmarks.gpu.measured import Report, run_item

FILES = ("test_layers", "test_training")
WORKERS = {"test_layers": 6, "test_training": 12}
SLOWEST = 5


class Outcomes:
    """Plugin of pytest that reports after each test, so that a killed item keeps what has passed."""

    def __init__(self, report: Report) -> None:
        self._report, self._started = report, time.perf_counter()
        self._outcomes: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._seconds = Counter[str]()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note that a worker has begun a test."""
        self._outcomes.setdefault(_name(nodeid), "unfinished")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the outcome of a part of a test: setup, call or teardown."""
        name = _name(report.nodeid)
        self._seconds[name] += report.duration
        if report.failed:
            self._outcomes[name] = "failed"
        elif report.skipped:
            self._outcomes[name] = "skipped"
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._reasons[name] = text.removeprefix("Skipped: ")[:200]
        elif report.when == "call":
            self._outcomes[name] = "passed"
        if report.when == "teardown":
            self._report.note(**self.figures())

    def figures(self) -> dict[str, Any]:
        """Return counts and names by outcome, the reasons, and the slowest tests so far."""

        def named(outcome: str) -> list[str]:
            return sorted(name for name, found in self._outcomes.items() if found == outcome)

        return {
            "passed": len(named("passed")),
            "failed": len(named("failed")),
            "passed_tests": named("passed"),
            "failed_tests": named("failed"),
            "unfinished_tests": named("unfinished"),
            "skipped": dict(Counter(self._reasons.values())),
            "slowest_seconds": {name: round(seconds, 2) for name, seconds in self._seconds.most_common(SLOWEST)},
            "last_outcome_after_seconds": round(time.perf_counter() - self._started, 2),
        }


def measure(report: Report) -> None:
    """Run pytest; a failed test is a figure, not an error."""
    import pytest

    # Each process would start a pool of compilers, one per core, for a few small kernels.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if report.is_rehearsal:
        os.environ["GPU_TESTS_REHEARSAL"] = "1"
    file = report.arguments.file
    workers = 1 if report.is_rehearsal else WORKERS[file]
    arguments = [f"tests/gpu/{file}.py", "-m", "gpu", f"-n{workers}", "--dist=worksteal", "-v"]
    arguments += ["-p", "no:cacheprovider", f"--basetemp={report.work / 'pytest'}"]
    started, outcomes = time.perf_counter(), Outcomes(report)
    status = pytest.main(arguments, plugins=[outcomes])
    report.note(**outcomes.figures(), seconds=time.perf_counter() - started, exit_status=int(status))


def _name(nodeid: str) -> str:
    return nodeid.rpartition("/")[2].replace(".py::", "::")


if __name__ == "__main__":
    sys.exit(run_item(measure, options=[("--file", FILES)]))
