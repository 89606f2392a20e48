"""The moving average of the weights: equal to a plain loop, in every layout, and without effect on training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.helpers.checkpoints import differing, read_tensors
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, read_reproducible_metrics, small_run, train_several

DECAY = 0.9
EMA = [f"ema.decay={DECAY}", "ema.every=2"]
PREFIX = "optimizer.state.ema."
KINDS = {
    "bf16": ["precision.compute=bf16"],
    "bf16-plain": ["precision.compute=bf16", "parallel.distributed_optimizer=false"],
    "fp32": [],
    "fp32-plain": ["parallel.distributed_optimizer=false"],
}
LAYOUTS = {
    "TP2": ["parallel.tensor=2"],
    "PP2": ["parallel.pipeline=2"],
    "VPP2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "TP2 x PP2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "DP4": [],
}

Arrays = dict[str, npt.NDArray[np.float64]]


def _long_except(default: tuple[str, ...], names: dict[str, list[str]]) -> list[object]:
    return [pytest.param(name, marks=() if name in default else pytest.mark.long) for name in names]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    # 250 ids are padded to 384, the embeddings are tied
    model = {"preset": "tiny_nemotron", "tied_embeddings": True, "vocab": 257}
    return small_run(
        folder, model=model, validation={"every": 3, "batches": 1, "sources": {"web": str(folder / "data" / "web")}}
    )


@pytest.fixture(scope="module")
def base(run_file: Path) -> Path:
    """Return a checkpoint to start from, whose weights are those before the first step."""
    output = run_file.parent / "base"
    assert run_ranks(1, train_several, str(run_file), [[f"output={output}", "stop_at_step=2"]]) == [[0]]
    return newest(output)


def averages(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the average of each weight by the weight's name."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


def master_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the fp32 weights that the optimizer updates; in an fp32 run these are the weights."""
    weights = [name for name in tensors if not name.startswith(("optimizer.", "rng."))]
    names = {name: [f"optimizer.state.{kind}.{name}" for kind in ("param", "fp32_param")] for name in weights}
    return {name: next((tensors[n] for n in names[name] if n in tensors), tensors[name]) for name in weights}


def plain_loop(start: dict[str, torch.Tensor], output: Path, steps: int) -> Arrays:
    """Return the average over the weights of every step, computed by numpy from the checkpoints of every step."""
    found = {name: weight.double().numpy() for name, weight in start.items()}
    for step in range(2, steps + 1, 2):
        tensors = master_weights(read_tensors(output / "checkpoints" / f"step-{step:08d}"))
        found = {name: DECAY * found[name] + (1 - DECAY) * tensors[name].double().numpy() for name in found}
    return found


@pytest.mark.parametrize("kind", _long_except(("bf16", "fp32-plain"), KINDS))
def test_it_equals_a_plain_loop_and_changes_nothing_else(run_file: Path, base: Path, kind: str) -> None:
    with_ema, without, halves = (run_file.parent / kind / name for name in ("with", "without", "halves"))
    run = [*KINDS[kind], f"init.from={base}", "stop_at_step=5"]
    ema = [*run, *EMA]
    runs = [
        [*ema, f"output={with_ema}", "checkpoint.every=1"],
        [*run, f"output={without}"],
        [*ema, f"output={halves}", "stop_at_step=3", "checkpoint.async=true"],
        [*ema, f"output={halves}"],
    ]
    assert run_ranks(2, train_several, str(run_file), runs) == [[0] * len(runs)] * 2

    tensors, start = read_tensors(newest(with_ema)), read_tensors(base)
    dtype = torch.bfloat16 if kind.startswith("bf16") else torch.float32
    before = {name: start[name].to(dtype) for name in master_weights(tensors)}
    expected, found = plain_loop(before, with_ema, 5), averages(tensors)
    assert found.keys() == expected.keys()
    for name, average in found.items():
        assert average.dtype == torch.float32
        np.testing.assert_allclose(average.numpy(), expected[name], rtol=2e-6, atol=1e-9, err_msg=name)
    assert differing(newest(with_ema), newest(without), ignore=(PREFIX,)) == []
    assert differing(newest(with_ema), newest(halves)) == []
    assert read_reproducible_metrics(with_ema) == read_reproducible_metrics(without)

    lines = {line["step"]: line for line in read_metrics(with_ema, "validation")}
    assert [line["validation"] for line in lines.values()] == [
        line["validation"] for line in read_metrics(without, "validation")
    ]
    assert lines[0]["validation_ema"] == lines[0]["validation"]
    assert lines[5]["validation_ema"]["web"] > lines[5]["validation"]["web"], "the average lags behind"
    assert all("validation_ema" not in line for line in read_metrics(without, "validation"))


@pytest.mark.parametrize("layout", _long_except(("TP2 x PP2",), LAYOUTS))
def test_every_layout_has_the_same_average(run_file: Path, base: Path, layout: str) -> None:
    alone, spread = run_file.parent / "alone" / layout, run_file.parent / "spread" / layout
    run = [*EMA, f"init.from={base}", "stop_at_step=4"]
    assert run_ranks(1, train_several, str(run_file), [[*run, f"output={alone}"]]) == [[0]]
    parts = LAYOUTS[layout]
    runs = [[*run, *parts, f"output={spread}"], [*run, f"output={alone}", *parts, "stop_at_step=5"]]
    assert run_ranks(4, train_several, str(run_file), runs) == [[0, 0]] * 4

    saved = averages(read_tensors(alone / "checkpoints" / "step-00000004"))
    for name, average in averages(read_tensors(newest(spread))).items():
        torch.testing.assert_close(average, saved[name], rtol=1e-6, atol=1e-6, msg=name)
    resumed = averages(read_tensors(newest(alone)))  # no update is due after step 5
    assert [name for name in saved if not resumed[name].equal(saved[name])] == []
    losses = [read_metrics(output, "validation_ema") for output in (alone, spread)]
    assert losses[1][-1]["validation_ema"]["web"] == pytest.approx(losses[0][-2]["validation_ema"]["web"], abs=1e-5)


def test_it_can_be_switched_on_and_off(run_file: Path, base: Path) -> None:
    pass
