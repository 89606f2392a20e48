"""Complete runs on one GPU: GPU and CPU, FP8 and bf16, resumes. `make gpu-test` runs these tests.

The runs share the process of the test, because importing torch, megatron-core and Transformer Engine takes 15 seconds,
longer than 20 steps; only a test that needs another process starts one. Every test has its own output folders, so the
tests may run in any order and in parallel.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_cpt.backend import cpu

cpu.install()

from tests.helpers.checkpoints import differing  # noqa: E402
from tests.helpers.runs import newest, read_metrics, small_run, train_here  # noqa: E402

# FP8 needs tokens and widths in multiples of 16, MXFP8 and FP4 of 32; tiny_nemotron at length 32 fits.
BF16 = "precision.compute=bf16"


def _train(run_file: Path, *overrides: str, allow: tuple[str, ...] = ()) -> str:
    """Train in this process; return the messages of the log."""
    log = io.StringIO()
    handler, logger = logging.StreamHandler(log), logging.getLogger("megatron_cpt")
    logger.addHandler(handler)
    try:
        status = train_here(str(run_file), overrides, allow)
    finally:
        logger.removeHandler(handler)
        _forget_fp8_state()
    assert status == 0, log.getvalue()
    return log.getvalue()


def _forget_fp8_state() -> None:
    """Drop Transformer Engine's scales of the last model, which are process-wide."""
    if "transformer_engine.pytorch" not in sys.modules:
        return
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


@contextlib.contextmanager
def _start_command(run_file: Path, *overrides: str, hide_gpu: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Run the command beside the block; an error in the block ends it."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {}
    command = [sys.executable, "-m", "megatron_cpt", "train", str(run_file), *overrides]
    process = subprocess.Popen(command, env={**os.environ, **hidden}, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output)]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def in_bf16(run_file: Path) -> Path:
    """Return the output folder of a complete run in bf16 with default knobs."""
    output = run_file.parent / "bf16"
    _train(run_file, f"output={output}", BF16)
    return output


def test_losses_on_a_gpu_are_those_on_the_cpu(run_file: Path) -> None:
    """The command on the CPU runs beside this process."""
    folder = run_file.parent
    with _start_command(run_file, f"output={folder}/cpu", hide_gpu=True) as on_cpu:
        log_of_gpu = _train(run_file, f"output={folder}/gpu")
        log_of_cpu = on_cpu.communicate()[1]
    assert on_cpu.returncode == 0, log_of_cpu
    assert "layers: " in log_of_gpu
    assert "layers: " in log_of_cpu
    # both in fp32, but TF32 may be on, and the order of sums differs
    assert _losses(folder / "gpu") == pytest.approx(_losses(folder / "cpu"), rel=2e-3)


def test_knobs_change_no_result_in_bf16(run_file: Path, in_bf16: Path) -> None:
    folder = run_file.parent
    off = (
        "speed={overlap_grad_reduce: false, overlap_param_gather: false, fused_cross_entropy: false, "
        "fused_rope: false, fused_activation: false, fused_bias_dropout: false, fused_grad_accumulation: false}"
    )
    assert "nothing fused or overlapped" in _train(run_file, f"output={folder}/plain", BF16, off)
    assert _losses(in_bf16) == pytest.approx(_losses(folder / "plain"), rel=1e-2)


def test_a_resume_in_bf16_follows_the_unbroken_run(run_file: Path, in_bf16: Path) -> None:
    folder = run_file.parent
    _train(run_file, f"output={folder}/resumed", BF16, "stop_at_step=10")
    _train(run_file, f"output={folder}/resumed", BF16)
    resumed = read_metrics(folder / "resumed")
    assert [line["step"] for line in resumed] == list(range(1, 21))
    assert _losses(folder / "resumed") == pytest.approx(_losses(in_bf16), rel=1e-2)


@pytest.mark.te
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"])
def test_losses_of_low_precision_stay_near_bf16(run_file: Path, in_bf16: Path, recipe: str, can_compute) -> None:
    folder = run_file.parent
    section = f"precision.fp8={{recipe: {recipe}, amax_history: 16}}" if recipe != "nvfp4" else "precision.fp4={}"
    can_compute(section)
    _train(run_file, f"output={folder}/{recipe}", BF16, section)
    bf16, low = _losses(in_bf16), _losses(folder / recipe)
    assert low != bf16
    assert sum(low[-5:]) == pytest.approx(sum(bf16[-5:]), rel=0.05 if recipe == "nvfp4" else 0.02)


@pytest.mark.te
@pytest.mark.parametrize("params", ["false", "true"], ids=["bf16 weights", "fp8 weights"])
def test_a_resume_keeps_the_amax_history(run_file: Path, params: str, can_compute) -> None:
    folder = run_file.parent
    section = f"precision.fp8={{recipe: delayed, amax_history: 16, params: {params}}}"
    can_compute(section)
    whole, halves = folder / f"whole-{params}", folder / f"halves-{params}"
    _train(run_file, f"output={whole}", BF16, section)
    _train(run_file, f"output={halves}", BF16, section, "stop_at_step=10")
    log = _train(run_file, f"output={halves}", BF16, section)
    assert "starts from scratch" not in log
    # Without the history, step 11 would use scales of 1, which changes the gradient norm at once.
    norms = [[line["grad_norm"] for line in read_metrics(output)] for output in (whole, halves)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    assert _losses(halves) == pytest.approx(_losses(whole), rel=5e-3)


@pytest.mark.te
def test_weights_in_fp8_train_like_weights_in_bf16(run_file: Path, in_bf16: Path, can_compute) -> None:
    """The fp32 masters come from the unrounded weights, random or from a checkpoint."""
    folder, section = run_file.parent, "precision.fp8={recipe: tensorwise, params: true}"
    can_compute(section)
    _train(run_file, f"output={folder}/fp8-weights", BF16, section)
    assert _losses(folder / "fp8-weights") == pytest.approx(_losses(in_bf16), rel=0.02)
    for name, more in (("from-bf16", []), ("from-fp8", [section])):
        _train(run_file, f"output={folder}/{name}", BF16, *more, f"init.from={in_bf16}", "stop_at_step=5")
    assert _losses(folder / "from-fp8") == pytest.approx(_losses(folder / "from-bf16"), rel=0.02)


@pytest.mark.te
def test_a_run_moves_from_bf16_to_fp8_and_says_so(run_file: Path, can_compute) -> None:
    folder = run_file.parent
    section = "precision.fp8={recipe: delayed, amax_history: 16}"
    can_compute(section)
    _train(run_file, f"output={folder}/moved", BF16, "stop_at_step=10")
    log = _train(run_file, f"output={folder}/moved", BF16, section, allow=("precision",))
    assert "FP8 scaling starts from scratch" in log
    assert all(loss < 7 for loss in _losses(folder / "moved"))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "rowwise"])
def test_losses_of_fp8_by_torch_stay_near_bf16(run_file: Path, in_bf16: Path, recipe: str, can_compute) -> None:
    folder, section = run_file.parent, f"precision.fp8={{backend: torch, recipe: {recipe}, amax_history: 16}}"
    can_compute(section)
    log = _train(run_file, f"output={folder}/torch-{recipe}", BF16, section)
    assert f"with FP8 by torch ({recipe}, hybrid)" in log
    bf16, low = _losses(in_bf16), _losses(folder / f"torch-{recipe}")
    assert low != bf16
    assert sum(low[-5:]) == pytest.approx(sum(bf16[-5:]), rel=0.02)


@pytest.mark.parametrize(
    "options",
    [["precision.fp8={backend: torch, recipe: tensorwise}"], ["speed.attention=flash"], ["optimizer.moments=bf16"]],
    ids=["fp8", "flash", "bf16 moments"],
)
def test_a_deterministic_resume_is_identical(run_file: Path, options: list[str], can_compute) -> None:
    can_compute(*options)
    name = options[0].partition("=")[0]
    whole, halves = (run_file.parent / f"deterministic-{name}-{part}" for part in ("whole", "halves"))
    run = [BF16, "deterministic=true", *options]
    _train(run_file, f"output={whole}", *run)
    _train(run_file, f"output={halves}", *run, "stop_at_step=10")
    _train(run_file, f"output={halves}", *run)
    assert _losses(halves) == _losses(whole)
    assert differing(newest(whole), newest(halves)) == []


def test_a_deterministic_resume_in_another_process_is_identical(run_file: Path) -> None:
    """The command continues here what another process has begun."""
    whole, halves = (run_file.parent / f"deterministic-{part}" for part in ("whole", "halves"))
    run = [BF16, "deterministic=true"]
    with _start_command(run_file, f"output={halves}", *run, "stop_at_step=10") as first:
        _train(run_file, f"output={whole}", *run)
        log = first.communicate()[1]
    assert first.returncode == 0, log
    _train(run_file, f"output={halves}", *run)
    assert _losses(halves) == _losses(whole)
    assert differing(newest(whole), newest(halves)) == []


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_attention_kernels_agree(run_file: Path, in_bf16: Path, kernel: str) -> None:
    output = run_file.parent / f"attention-{kernel}"
    _train(run_file, f"output={output}", BF16, f"speed.attention={kernel}")
    assert _losses(output) == pytest.approx(_losses(in_bf16), rel=1e-2)
