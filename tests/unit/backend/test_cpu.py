"""The CPU backend on a machine where libraries for CUDA are installed, such as a login node or a container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from megatron_cpt.backend import cpu
assert cpu.install()
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads
assert optimizer.USING_PYTORCH_OPTIMIZER
import importlib.util
assert importlib.util.find_spec("{library}") is None
"""


@pytest.mark.parametrize(
    "library", ["transformer_engine", *(pytest.param(name, marks=pytest.mark.long) for name in ("apex", "amp_C"))]
)
def test_kernels_for_cuda_are_not_taken_on_a_cpu(tmp_path: Path, library: str) -> None:
    package = tmp_path / library
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("it needs a CUDA device")\n')
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROGRAM.format(library=library)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
