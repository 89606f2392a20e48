"""Calculations of the GPU measurements, and the plain PyTorch rival: it is the same function as our model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_cpt.backend import cpu, process_groups, seed_everything
from megatron_cpt.config import draft_config
from tests.unit.model.test_capabilities import RUN

cpu.install()

from benchmarks.gpu import workload  # noqa: E402
from benchmarks.gpu.busy import busy_seconds  # noqa: E402
from benchmarks.gpu.gpu_tests import Outcomes  # noqa: E402
from benchmarks.gpu.knobs import variants  # noqa: E402
from benchmarks.gpu.losses import difference  # noqa: E402
from benchmarks.gpu.measured import Report  # noqa: E402
from benchmarks.gpu.plain_gpt import PlainGPT, copy_from_megatron, plain_steps  # noqa: E402
from benchmarks.gpu.train_1b import split_steps, stall  # noqa: E402
from benchmarks.gpu.workload import ONE_BILLION, STACK, random_batches  # noqa: E402

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("preset", ["tiny_nemotron", "tiny_llama"])
def test_the_plain_rival_has_our_loss_and_gradients(preset: str) -> None:
    from megatron_cpt.checkpoint.state.state_dicts import unwrap
    from megatron_cpt.model.build_model import build_model

    overrides = [f"model={preset}", "precision.compute=fp32", "batch.micro=2"]
    run = draft_config(dict(RUN), overrides).finish("run.yaml")
    (batch,) = random_batches(run)
    tokens, positions, labels = (torch.from_numpy(x) for x in (batch.tokens, batch.position_ids, batch.labels))
    with process_groups(run.parallel):
        seed_everything(run.seed, pipeline_rank=0)
        (chunk,) = build_model(run).chunks
        ours = unwrap(chunk)
        # Norms and biases that differ from their initial values, so that a weight that is not copied shows.
        with torch.no_grad():
            for parameter in ours.parameters():
                if parameter.dim() == 1:
                    parameter += torch.linspace(-0.3, 0.3, parameter.numel())
        weights = dict(ours.named_parameters())
        loss = chunk(tokens, positions, None, labels=labels).float().mean()
        loss.backward()
        gradient = weights["decoder.layers.1.self_attention.linear_qkv.weight"].main_grad.clone()
        plain = PlainGPT(run.model, run.seq_length)
        copy_from_megatron(plain, weights)
    rival = plain(tokens, labels)
    rival.backward()
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in weights.values())
    torch.testing.assert_close(rival, loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(plain.layers[1].qkv.weight.grad, gradient, rtol=1e-3, atol=1e-6)


def test_the_plain_rival_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, backend: model)
    run = draft_config(dict(RUN), ["precision.compute=bf16"]).finish("run.yaml")
    torch.manual_seed(0)
    step = plain_steps(run, random_batches(run))
    losses = [step() for _ in range(10)]
    assert losses[0] == pytest.approx(np.log(run.model.vocab), rel=0.05)
    assert losses[-1] < losses[0] - 0.5


def test_overlapping_kernels_count_once() -> None:
    assert busy_seconds([(2, 5), (0, 3), (1, 2), (7, 8)]) == 6
    assert busy_seconds([]) == 0


def test_the_stall_of_a_save_is_what_its_steps_take_longer() -> None:
    # Steps of 1 s; the save after step 4 makes step 5 last 3 s and step 6 last 2 s, and is published during step 7.
    ends = [0.0, 1, 2, 3, 4, 7, 9, 10, 11, 12]
    undisturbed, disturbed = split_steps(ends, [9.5], every=4, warm_up=1)
    assert disturbed == [[3, 2, 1]]
    assert undisturbed == [1, 1, 1, 1, 1]
    assert stall(undisturbed, disturbed[0]) == 3
    assert stall([2.0], [1.0]) == 0


def test_a_save_that_is_published_before_the_next_step_disturbs_one_step() -> None:
    ends = [0.0, 1, 2, 5, 6]
    assert split_steps(ends, [4.5], every=2, warm_up=0) == ([1, 1, 1], [[3]])


def test_losses_are_compared_by_the_largest_relative_difference() -> None:
    assert difference([2.0, 1.1], [2.0, 1.0]) == pytest.approx(0.1)


def test_outcomes_of_tests_are_on_disk_as_soon_as_each_test_ends(tmp_path: Path) -> None:
    """A real pytest: its last test ends the process, as a limit would."""
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skip(reason='needs FP8')\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no GPU')\n"
        "def test_broken(broken): pass\n"
        "def test_killed(): os._exit(9)\n"
    )
    figures = tmp_path / "figures.json"
    code = (
        "import sys, pathlib, pytest\n"
        "from benchmarks.gpu.gpu_tests import Outcomes\n"
        "from benchmarks.gpu.measured import Report\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "report = Report(folder / 'figures.json', folder, folder, is_rehearsal=True)\n"
        "pytest.main([str(folder), '-p', 'no:cacheprovider', '-c', '/dev/null'], plugins=[Outcomes(report)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 9, done
    found = json.loads(figures.read_text())
    assert found["passed_tests"] == ["test_some::test_good"]
    assert found["failed_tests"] == ["test_some::test_bad", "test_some::test_broken"]
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, {"needs FP8": 1})
    assert "test_some::test_bad" in found["slowest_seconds"]


def test_a_test_that_has_begun_is_unfinished_until_it_ends(tmp_path: Path) -> None:
    outcomes = Outcomes(Report(None, tmp_path, tmp_path, is_rehearsal=True))
    outcomes.pytest_runtest_logstart("tests/gpu/test_layers.py::test_one[bf16]")
    assert outcomes.figures()["unfinished_tests"] == ["test_layers::test_one[bf16]"]


def test_every_knob_that_is_on_is_turned_off_once() -> None:
    found = dict(variants(["fused_rope", "fused_activation"], is_rehearsal=False))
    assert found["no-fused_rope"] == {"fused_rope": False}
    assert "no-overlap_grad_reduce" not in found


def test_a_known_gpu_adds_mfu_and_the_adviser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    report = Report(None, tmp_path, tmp_path, is_rehearsal=True)
    run = workload.config_of(workload.one_billion_run(report, steps=2))
    workload.report_speed(report, run, [0.5, 1.0, 2.0])
    figures = report.figures
    assert figures["tokens_per_second"] == {"median": 512, "min": 256, "max": 1024, "repetitions": 3}
    assert figures["mfu"]["median"] == pytest.approx(figures["tflops"]["median"] / 989)
    assert figures["step_over_adviser"]["max"] == pytest.approx(2 / figures["adviser_step_seconds"])
    estimate = workload.adviser_estimate(run)
    assert estimate is not None
    assert estimate.memory.total > estimate.memory.reserved > 0


def test_figures_are_on_disk_after_each_note(tmp_path: Path) -> None:
    report = Report(tmp_path / "figures.json", tmp_path, tmp_path, is_rehearsal=True)
    report.note(device="CPU")
    report.repeated("seconds", [3.0, 1.0, 2.0])
    assert report.path is not None
    assert '"median": 2.0, "min": 1.0, "max": 3.0, "repetitions": 3' in report.path.read_text()


def test_the_measured_models_have_the_size_of_their_names() -> None:
    from megatron_cpt.planning.cost.parameters import count_parameters

    def count(model: dict[str, Any]) -> Any:
        return count_parameters(draft_config({**RUN, "model": model}).finish("run.yaml").model)

    assert count(ONE_BILLION).total == pytest.approx(1.1e9, rel=0.01)
    layer = count({"preset": "nemotron4_15b"}).layer
    shard = SimpleNamespace(matmul=count(STACK).layer.matmul)
    assert shard.matmul == layer.matmul / 2
