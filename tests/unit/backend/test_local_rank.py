"""The launcher's variables against the GPUs of a process."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from megatron_cpt.backend import distributed
from megatron_cpt.errors import UserError


def test_a_rank_without_a_gpu_of_its_own_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM with --gpus-per-task shows every rank one GPU; torch reports "invalid device ordinal" there."""
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"LOCAL_RANK=3, but this process sees 1 GPU; .*--gpus-per-task"):
        distributed._initialize(on_cpu=False, timeout=timedelta(seconds=1))
