"""Losses, rates and the use of the hardware in a line of metrics, by exact numbers."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_cpt.config import PrecisionConfig, TeacherConfig
from megatron_cpt.train import metrics
from megatron_cpt.train.metrics import (
    LossMeter,
    mean_divergences,
    mean_losses,
    mean_objective,
    metrics_line,
    peak_flops,
)
from megatron_cpt.train.step import StepResult

BF16 = PrecisionConfig.model_validate({"compute": "bf16"})
FP8 = PrecisionConfig.model_validate({"compute": "bf16", "fp8": {"recipe": "delayed"}})
TORCH_FP8 = PrecisionConfig.model_validate({"compute": "bf16", "fp8": {"backend": "torch", "recipe": "rowwise"}})
EMULATED = PrecisionConfig.model_validate({"compute": "bf16", "fp8": {"backend": "emulated"}})
FP4 = PrecisionConfig.model_validate({"compute": "bf16", "fp4": {}})
FP32 = PrecisionConfig.model_validate({"compute": "fp32"})
H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("device_name", "precision", "peak"),
    [
        (H100, BF16, 989e12),
        (H100, FP8, 1979e12),
        (H100, EMULATED, 989e12),
        (H100, FP32, None),
        ("NVIDIA B200", FP4, None),
        ("NVIDIA H200", BF16, 989e12),
        ("NVIDIA A100-SXM4-80GB", BF16, 312e12),
        ("NVIDIA A100-SXM4-80GB", FP8, None),
        ("NVIDIA B200", FP8, 4500e12),
        ("NVIDIA H100 80GB HBM3", TORCH_FP8, 1979e12),
        ("NVIDIA H100 PCIe", BF16, None),
        ("NVIDIA H100 NVL", BF16, None),
        ("NVIDIA GH200 480GB", BF16, None),
        ("Tesla T4", BF16, None),
        ("cpu", BF16, None),
    ],
)
def test_the_peak_is_known_by_device_and_number_format(device_name, precision, peak):
    assert peak_flops(device_name, precision) == peak


def test_means_are_over_tokens():
    total = torch.tensor([[6.0, 3.0], [2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert mean_losses(total, ["web", "code", "qa"]) == (2.0, {"web": 2.0, "code": 2.0})


def test_the_objective_mixes_cross_entropy_and_divergence_by_source():
    teacher = TeacherConfig.model_validate({"from": "x", "weight": 0.5, "temperature": 2.0, "sources": {"qa": 0.0}})
    total = torch.tensor([[6.0, 3.0, 1.5], [2.0, 1.0, 9.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    names = ["web", "qa", "code"]
    # web: 0.5 x 6 + 0.5 x 4 x 1.5 = 6; qa: 2, its divergence does not count
    assert mean_objective(total, names, teacher) == 2.0
    assert mean_objective(total[:, :2], names, None) == 2.0
    assert mean_divergences(total, names, teacher) == (0.5, {"web": 0.5})
    assert mean_divergences(total[1:], names[1:], teacher) == (None, {})


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now.seconds)
    return now


def make_session(device="cpu", precision=BF16):
    segment = SimpleNamespace(global_batch=8, seq_length=32)
    return SimpleNamespace(
        meter=LossMeter(["web"], contributes_loss=True),
        config=SimpleNamespace(precision=precision),
        ranks=SimpleNamespace(world_size=4, device=torch.device(device)),
        state=SimpleNamespace(step=3, tokens=3000, samples_by_source={"web": 24}, skipped=0),
        last_step=10,
        plan=SimpleNamespace(
            segment_of=lambda step: segment,
            phase_of=lambda step: SimpleNamespace(name="general"),
            after=lambda step: SimpleNamespace(tokens=1000 * step),
        ),
    )


RESULT = StepResult(1e-3, torch.zeros(1, 2), 0.5, None, [False, False])


def test_rates_are_per_second_and_gpu_without_the_time_of_saves(clock):
    session = make_session()
    session.meter.add(torch.tensor([[10.0, 4.0]], dtype=torch.float64), 1000, 2e9)
    session.meter.add(torch.tensor([[2.0, 2.0]], dtype=torch.float64), 1000, 4e9)
    clock.seconds += 5.0
    session.meter.skip_time(1.0)
    line = metrics_line(session, RESULT)
    assert line["loss"] == 2.0
    assert line["tokens_per_second"] == 2000 / 4.0
    assert line["tflops_per_gpu"] == (1000 * 2e9 + 1000 * 4e9) / 4.0 / 4 / 1e12
    assert line["eta"] == 7000 / 500
    assert line["step_seconds"] == 2.0
    assert line["reserved_memory_gib"] is None
    assert line["mfu"] is None
    assert 0.01 < line["peak_memory_gib"] < 1000
    assert session.meter.take()["tokens_per_second"] == 0.0


def test_a_gpu_has_an_mfu_and_the_peak_of_its_own_memory(clock, monkeypatch):
    monkeypatch.setattr(metrics.torch.cuda, "get_device_name", lambda: H100)
    monkeypatch.setattr(metrics.torch.cuda, "max_memory_allocated", lambda: 3 << 29)
    monkeypatch.setattr(metrics.torch.cuda, "max_memory_reserved", lambda: 1 << 31)
    session = make_session("cuda")
    session.meter.add(torch.tensor([[10.0, 4.0]], dtype=torch.float64), 1000, 989e9)
    clock.seconds += 2.0
    line = metrics_line(session, RESULT)
    assert line["mfu"] == 1000 * 989e9 / 2.0 / 4 / 989e12 == 0.125
    assert line["peak_memory_gib"] == 1.5
    assert line["reserved_memory_gib"] == 2.0


def test_waits_are_means_over_the_steps_of_a_line(clock):
    session = make_session()
    for wait in (0.5, 1.5):
        with session.meter.data_wait:
            clock.seconds += wait
        with session.meter.sync_wait:
            clock.seconds += 3.0
        session.meter.add(torch.zeros(1, 2, dtype=torch.float64), 1000, 1e9)
    line = metrics_line(session, RESULT)
    assert (line["data_wait_seconds"], line["sync_wait_seconds"], line["step_seconds"]) == (1.0, 3.0, 4.0)
    session.meter.add(torch.zeros(1, 2, dtype=torch.float64), 1000, 1e9)
    clock.seconds += 1.0
    line = metrics_line(session, RESULT)
    assert (line["data_wait_seconds"], line["sync_wait_seconds"], line["step_seconds"]) == (0.0, 0.0, 1.0)


def test_a_wait_that_ends_in_an_error_is_counted(clock):
    meter = LossMeter(["web"], contributes_loss=True)

    def fail():
        clock.seconds += 2.0
        raise StopIteration

    with pytest.raises(StopIteration), meter.data_wait:
        fail()
    assert meter.data_wait.take() == 2.0


def test_importing_the_trainer_loads_no_megatron_core():
    """On a CPU `backend/cpu.py` must come first, and the command must catch signals before the slow import."""
    code = "import sys, megatron_cpt.train.trainer; print([n for n in sys.modules if n.startswith('megatron.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
