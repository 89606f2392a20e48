"""The tests of tests/gpu in parallel on one GPU.

python -m benchmarks.gpu.gpu_tests
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.measured import Report, run_item

WORKERS = 6
SLOWEST = 5


def measure(report: Report) -> None:
    """Run pytest and report the outcome of each test; a failed test is a figure, not an error."""
    path = report.work / "junit.xml"
    workers = 1 if report.is_rehearsal else WORKERS
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", f"-n{workers}", "--dist=worksteal"]
    command += ["-p", "no:cacheprovider", f"--basetemp={report.work / 'pytest'}", f"--junit-xml={path}"]
    rehearsal = {"GPU_TESTS_REHEARSAL": "1"} if report.is_rehearsal else {}
    started = time.perf_counter()
    done = subprocess.run(command, check=False, env={**os.environ, **rehearsal})
    report.note(seconds=time.perf_counter() - started, exit_status=done.returncode)
    report.note(**read_outcomes(path))


def read_outcomes(path: Path) -> dict[str, Any]:
    """Return counts by outcome, the reasons, and the slowest tests of a JUnit file."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    outcomes: dict[str, str] = {}
    skipped = Counter[str]()
    for case in cases:
        found = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        outcomes[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = found
        if found == "skipped":
            skipped[(case.find("skipped").get("message") or "")[:200]] += 1  # type: ignore[union-attr]
    seconds = {str(case.get("name")): float(case.get("time", 0)) for case in cases}
    return {
        "passed": sum(outcome == "passed" for outcome in outcomes.values()),
        "failed": sum(outcome in ("failure", "error") for outcome in outcomes.values()),
        "failed_tests": [name for name, outcome in outcomes.items() if outcome in ("failure", "error")],
        "skipped": dict(skipped),
        "slowest_seconds": dict(sorted(seconds.items(), key=lambda entry: -entry[1])[:SLOWEST]),
    }


if __name__ == "__main__":
    sys.exit(run_item(measure))
