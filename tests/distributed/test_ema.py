"""The moving average of the weights: equal to a plain loop, in every layout, and without effect on training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
from megatron_cpt.convert.logits import compare_logits
from megatron_cpt.convert.verify import verify_tensors
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.evaluate.generate_texts import generate_texts
from tests.helpers.checkpoints import differing, read_tensors
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import (
    newest,
    read_metrics,
    read_reproducible_metrics,
    small_run,
    train_here,
    train_several,
    train_with_hooks,
)

DECAY = 0.9
EMA = [f"ema.decay={DECAY}", "ema.every=2"]
PREFIX = "optimizer.state.ema."
KINDS = {
    "bf16": ["precision.compute=bf16"],
    "bf16-plain": ["precision.compute=bf16", "parallel.distributed_optimizer=false"],
    "fp32": [],
    "fp32-plain": ["parallel.distributed_optimizer=false"],
    "overlap": ["precision.compute=bf16", "speed={overlap_grad_reduce: true, overlap_param_gather: true}"],
    "fp8": ["precision={compute: bf16, fp8: {backend: emulated, recipe: delayed}}"],
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
    model = {"preset": "tiny_nemotron", "tied_embeddings": True}  # 257 ids, padded to 384
    held_out = {"every": 3, "batches": 1, "sources": {"web": str(folder / "data" / "web")}}
    return small_run(folder, model=model, validation=held_out)


@pytest.fixture(scope="module")
def origin(run_file: Path) -> Path:
    """Return a checkpoint with an average, whose weights other runs start from."""
    output = run_file.parent / "origin"
    run = [f"output={output}", "ema.decay=0.5", "stop_at_step=2"]
    assert run_ranks(1, train_several, str(run_file), [run]) == [[0]]
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
def test_it_equals_a_plain_loop_and_changes_nothing_else(run_file: Path, origin: Path, kind: str) -> None:
    with_ema, without, halves = (run_file.parent / kind / name for name in ("with", "without", "halves"))
    run = [*KINDS[kind], f"init.from={origin}", "stop_at_step=5"]
    ema = [*run, *EMA]
    runs = [
        [*ema, f"output={with_ema}", "checkpoint.every=1"],
        [*run, f"output={without}"],
        [*ema, f"output={halves}", "stop_at_step=3", "checkpoint.async=true"],
        [*ema, f"output={halves}"],
    ]
    assert run_ranks(2, train_several, str(run_file), runs) == [[0] * len(runs)] * 2

    tensors, start = read_tensors(newest(with_ema)), read_tensors(origin)
    dtype = torch.float32 if kind.startswith("fp32") else torch.bfloat16
    before = {name: start[name].to(dtype) for name in master_weights(start)}  # without the amax histories of FP8
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
def test_every_layout_has_the_same_average(run_file: Path, origin: Path, layout: str) -> None:
    alone, spread = run_file.parent / "alone" / layout, run_file.parent / "spread" / layout
    # Adam's moments of the origin: in its first step Adam divides a gradient by itself, which magnifies rounding
    run = [*EMA, f"init.from={origin}", "init.load=weights+optimizer", "stop_at_step=4"]
    assert run_ranks(1, train_several, str(run_file), [[*run, f"output={alone}"]]) == [[0]]
    parts = LAYOUTS[layout]
    runs = [[*run, *parts, f"output={spread}"], [*run, f"output={alone}", *parts, "stop_at_step=5"]]
    assert run_ranks(4, train_several, str(run_file), runs) == [[0, 0]] * 4

    saved = averages(read_tensors(alone / "checkpoints" / "step-00000004"))
    for name, average in averages(read_tensors(newest(spread))).items():
        assert (average - saved[name]).norm() <= 1e-6 * saved[name].norm(), name
    resumed = averages(read_tensors(newest(alone)))  # no update of the average is due after step 5
    assert [name for name in saved if not resumed[name].equal(saved[name])] == []
    at_step_4 = [
        next(line["validation_ema"]["web"] for line in read_metrics(output, "validation_ema") if line["step"] == 4)
        for output in (alone, spread)
    ]
    assert at_step_4[1] == pytest.approx(at_step_4[0], rel=1e-6)


def skip_the_update_of_step_4(trainer: Any) -> None:
    """Make the loss of step 4 NaN."""
    from megatron_cpt.train.forward import ForwardPass

    session = trainer.session

    class Poisoned(ForwardPass):
        def __call__(self, micro_batches: Any, *, train: bool) -> torch.Tensor:
            losses = super().__call__(micro_batches, train=train)
            return losses * float("nan") if train and session.state.step == 3 else losses

    fields = {name: getattr(session.forward, name) for name in session.forward.__dataclass_fields__}
    trainer.session = replace(session, forward=Poisoned(**fields))


def train_with_a_skipped_update(path: str, overrides: list[str]) -> int:
    return train_with_hooks(path, overrides, prepare=skip_the_update_of_step_4)


def test_a_skipped_update_leaves_the_average_unchanged(run_file: Path) -> None:
    output = run_file.parent / "skipped"
    run = [*EMA, f"output={output}", "checkpoint.every=2", "stop_at_step=5"]
    assert run_ranks(1, train_with_a_skipped_update, str(run_file), run) == [0]
    before, after = (averages(read_tensors(output / "checkpoints" / f"step-0000000{step}")) for step in (2, 5))
    assert read_metrics(output)[-1]["skipped_updates"] == 1
    assert [name for name in before if not before[name].equal(after[name])] == []


def refused(path: str, overrides: list[str]) -> str:
    with pytest.raises(RefusedError) as caught:
        train_here(path, overrides)
    return str(caught.value)


def test_it_is_switched_off_if_allowed_and_on_from_the_current_weights(run_file: Path, origin: Path) -> None:
    output = run_file.parent / "switched"
    shutil.copytree(origin.parents[1], output)
    off, on = [f"output={output}", "stop_at_step=3"], [f"output={output}", "ema.decay=0.25", "stop_at_step=4"]
    assert "ema: {'decay': 0.5, 'every': 1} -> None" in run_ranks(1, refused, str(run_file), off)[0]
    assert run_ranks(1, train_here, str(run_file), off, ["ema", "run"]) == [0]
    without = read_tensors(newest(output))
    assert averages(without) == {}
    with pytest.raises(UserError, match=r"--weights ema: .*has no moving average"):
        export_checkpoint(output, run_file.parent / "none", ExportOptions(weights="ema"))
    with pytest.raises(UserError, match=r"--weights ema: .*has no moving average"):
        generate_texts(output, ["a"], tokenizer="byte", weights="ema")
    assert run_ranks(1, train_here, str(run_file), on) == [0]
    tensors = read_tensors(newest(output))
    for name, average in averages(tensors).items():
        expected = 0.25 * master_weights(without)[name] + 0.75 * master_weights(tensors)[name]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-8)


def test_it_is_exported_verified_and_loaded_in_place_of_the_weights(run_file: Path, origin: Path) -> None:
    exported = run_file.parent / "exported"
    untied = [f"output={run_file.parent / 'untied'}", "model.tied_embeddings=false", *EMA, "stop_at_step=2"]
    assert run_ranks(1, train_here, str(run_file), untied) == [0]
    for checkpoint in (origin, newest(run_file.parent / "untied")):
        folder = exported / checkpoint.parents[1].name
        export_checkpoint(checkpoint, folder, ExportOptions(weights="ema"))
        assert verify_tensors(folder, checkpoint, weights="ema").is_equal
        of_weights = verify_tensors(folder, checkpoint)
        assert of_weights.differing
        assert "--weights ema" in of_weights.note
        (report,) = run_ranks(1, compare, folder, checkpoint)
        assert report.max_difference < 1e-4
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    average = averages(read_tensors(checkpoint))["embedding.word_embeddings.weight"]
    assert embedding.equal(average[:257])
    assert "| weights | moving average, decay 0.9 every 2 steps |" in (folder / "README.md").read_text()


def compare(hf: Path, checkpoint: Path) -> Any:
    return compare_logits(hf, checkpoint, weights="ema")
