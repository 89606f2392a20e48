"""Trainings in processes of their own, some of them side by side, each with its metrics as the result."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.measured import Report


class Training:
    """One process of `python -m benchmarks.gpu.children`, which trains a run and writes its metrics."""

    def __init__(self, report: Report, name: str, run: dict[str, Any], *, on_cpu: bool = False, local: bool = False):
        self.name, self._lines = name, report.work / f"{name}.lines.json"
        job = report.work / f"{name}.job.json"
        job.write_text(json.dumps({"run": run, "local": local, "lines": str(self._lines)}))
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
        command = [sys.executable, "-m", "benchmarks.gpu.children", str(job)]
        self._process = subprocess.Popen(command, env={**os.environ, **hidden})

    def lines(self) -> list[dict[str, Any]]:
        """Wait for the end and return the lines of metrics.

        Raises:
            RuntimeError: the training failed; its log is in the item's log.
        """
        status = self._process.wait()
        if status != 0:
            raise RuntimeError(f"{self.name}: the training ended with status {status}")
        found: list[dict[str, Any]] = json.loads(self._lines.read_text())
        return found


def main(arguments: Sequence[str]) -> int:
    """Train the run of a job file."""
    job = json.loads(Path(arguments[0]).read_text())
    importlib.import_module("benchmarks.gpu.trainer_imports")
    from benchmarks.gpu.workload import config_of, train
    from megatron_cpt.hooks import Hook

    if job["local"]:
        from benchmarks.gpu.stack import use_local_layers

        use_local_layers()
    lines: list[dict[str, Any]] = []

    class Collect(Hook):
        def on_metrics(self, session: Any, line: dict[str, Any]) -> None:
            lines.append(line)

    train(config_of(job["run"]), [Collect()])
    Path(job["lines"]).write_text(json.dumps(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
