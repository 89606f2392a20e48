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


def train_on_fake_gpu(cases: Sequence[Mapping[str, Any]], *, timeout: float = 1800) -> list[dict[str, Any]]:
    """Train two steps of every case in one new process, and return what `steps.run_case` saw in the second step."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "tests.helpers.fake_cuda", json.dumps([dict(case) for case in cases])]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the fake device failed:\n{done.stderr[-8000:]}")
    reports: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return reports
