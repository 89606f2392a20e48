"""On one GPU: the same run as on the CPU. `make gpu-test` runs these; elsewhere they skip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import read_metrics, small_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _train(run_file: Path, *overrides: str, hide_gpu: bool = False) -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {}
    command = [sys.executable, "-m", "megatron_cpt", "train", str(run_file), *overrides]
    subprocess.run(command, check=True, env={**os.environ, **hidden}, timeout=300)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("gpu"))


def test_losses_on_a_gpu_are_those_on_the_cpu(run_file: Path) -> None:
    folder = run_file.parent
    _train(run_file, f"output={folder}/cpu", hide_gpu=True)
    _train(run_file, f"output={folder}/gpu")
    cpu, gpu = read_metrics(folder / "cpu"), read_metrics(folder / "gpu")
    # fp32 on both sides, but TF32 may be on and sums have another order
    assert [line["loss"] for line in gpu] == pytest.approx([line["loss"] for line in cpu], rel=2e-3)


def test_a_resume_on_a_gpu_in_bf16_follows_the_unbroken_run(run_file: Path) -> None:
    folder = run_file.parent
    bf16 = "precision.compute=bf16"
    _train(run_file, f"output={folder}/unbroken", bf16)
    _train(run_file, f"output={folder}/resumed", bf16, "stop_at_step=10")
    _train(run_file, f"output={folder}/resumed", bf16)
    unbroken, resumed = read_metrics(folder / "unbroken"), read_metrics(folder / "resumed")
    assert [line["step"] for line in resumed] == list(range(1, 21))
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in unbroken], rel=1e-2)
