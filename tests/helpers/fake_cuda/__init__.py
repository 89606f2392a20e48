"""A CUDA device that does not exist, for tests of the GPU path on any machine; docs/internals/gpu-path.md explains it.

The device must be installed before torch is imported, and it changes torch for the whole process. So a test calls
`train_on_fake_gpu`, which starts a process, and reads the reports that it returns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]

RUN: dict[str, Any] = {
    "name": "fake",
    "output": "runs/fake",
    "model": {"preset": "nemotron4_15b"},
    "seq_length": 4096,
    "batch": {"global": 64, "micro": 1},
    "tokens": 64 * 4096,
    "schedule": {"max_lr": 4.5e-5},
    "sources": {"web": {"path": "data/web"}, "code": {"path": "data/code"}},
    "phases": [{"name": "only", "blend": {"web": 0.5, "code": 0.5}}],
    "parallel": {"tensor": 8, "pipeline": 4, "sequence": True, "distributed_optimizer": True},
    "precision": {"compute": "bf16"},
}
"""Nemotron-4 15B, the example's layout; cases change it."""


def train_on_fake_gpu(cases: Sequence[Mapping[str, Any]], *, timeout: float = 3600) -> list[dict[str, Any]]:
    """Train two steps of every case in one new process, and return what `steps.run_case` saw in the second step."""
    reports: list[dict[str, Any]] = _run(json.dumps([dict(case) for case in cases]), timeout)
    return reports


def run_probe() -> dict[str, Any]:
    """Return what the fake device sees of small operations; see `probe.py`."""
    report: dict[str, Any] = _run("probe", 600)
    return report


def _run(argument: str, timeout: float) -> Any:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.fake_cuda", argument]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the fake device failed:\n{done.stderr[-8000:]}")
    return json.loads(done.stdout.splitlines()[-1])
