"""A Transformer Engine that does not load is one clear message, although megatron-core imports it first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import torch
torch.cuda.is_available = lambda: True  # as on a GPU machine, where nothing keeps megatron-core from importing it
from megatron_cpt.backend.distributed import process_groups
from megatron_cpt.config import ParallelConfig
from megatron_cpt.errors import UserError
try:
    process_groups(ParallelConfig()).__enter__()
except UserError as error:
    print(error)
"""


def test_a_transformer_engine_that_does_not_load_is_a_users_mistake(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcublasLt.so: undefined symbol: cublasLtX\\nmore')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (message,) = done.stdout.splitlines()
    assert message.startswith(
        "Transformer Engine is installed, but does not load: libcublasLt.so: undefined symbol: cublasLtX; install a"
    )
