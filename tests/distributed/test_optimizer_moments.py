"""Runs with Adam's moments in bf16, and deterministic runs: identical on a resume, and in another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_cpt.errors import RefusedError
from tests.helpers.checkpoints import differing, read_tensors
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, small_run, train_here, train_several

MOMENTS = ["optimizer.moments=bf16", "precision.compute=bf16"]


def _losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output)]


def _refused(path: str, overrides: list[str]) -> str:
    with pytest.raises(RefusedError) as caught:
        train_here(path, overrides)
    return str(caught.value)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("moments"))


@pytest.mark.parametrize(
    "sharded",
    [
        pytest.param("true", id="distributed optimizer"),
        pytest.param("false", id="plain optimizer", marks=pytest.mark.long),
    ],
)
def test_a_resume_with_bf16_moments_is_identical(run_file: Path, sharded: str) -> None:
    folder = run_file.parent / sharded
    run = ["tokens=2048", *MOMENTS, f"parallel.distributed_optimizer={sharded}", "deterministic=true"]
    whole, halves, moved, fp32 = (folder / name for name in ("whole", "halves", "moved", "fp32"))
    runs = [[*run, f"output={whole}"], *([*run, f"output={output}", "stop_at_step=4"] for output in (halves, moved))]
    runs.append([*run, f"output={halves}"])
    runs.append([*run, f"output={moved}", "parallel.tensor=2", "stop_at_step=6"])
    runs.append(["tokens=2048", "precision.compute=bf16", f"output={fp32}"])
    assert run_ranks(2, train_several, str(run_file), runs) == [[0] * len(runs)] * 2
    assert differing(newest(whole), newest(halves)) == []
    assert _losses(halves) == _losses(whole)
    assert _losses(moved)[4:] == pytest.approx(_losses(whole)[4:6], rel=1e-3)
    assert _losses(whole) != _losses(fp32)
    assert _losses(whole) == pytest.approx(_losses(fp32), rel=5e-3)

    stored = read_tensors(newest(whole))
    moments = {name: tensor.dtype for name, tensor in stored.items() if ".exp_avg" in name}
    assert len(moments) > 10
    assert set(moments.values()) == {torch.bfloat16}
    assert {
        tensor.dtype for name, tensor in stored.items() if "optimizer.state" in name and ".exp_avg" not in name
    } == {torch.float32}


def test_the_format_changes_only_if_allowed(run_file: Path) -> None:
    folder, plain = run_file.parent / "allowed", "precision.compute=bf16"
    assert run_ranks(2, train_several, str(run_file), [[plain, f"output={folder}", "stop_at_step=2"]]) == [[0], [0]]
    for changes in ([*MOMENTS, "stop_at_step=4"], [plain, "stop_at_step=6"]):
        overrides = [*changes, f"output={folder}"]
        (message, _) = run_ranks(2, _refused, str(run_file), overrides)
        assert "optimizer: moments" in message
        assert run_ranks(2, train_here, str(run_file), overrides, ["optimizer"]) == [0, 0]
    assert len(_losses(folder)) == 6
    assert max(_losses(folder)) < 7
