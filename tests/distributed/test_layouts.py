"""Runs from one checkpoint in many layouts have equal samples and losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoints import differing
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, train_here, train_several

# number of ranks -> layout -> overrides; each kind of layout once
LAYOUTS = {
    2: {
        "pp2-interleaved-uneven": ["parallel={pipeline: 2, virtual_pipeline: 2, pipeline_layout: [1, 2, 1, 0]}"],
        "dp2-plain-optimizer": ["parallel.distributed_optimizer=false"],
    },
    4: {"tp2-sp-dp2": ["parallel.tensor=2", "parallel.sequence=true"]},
}
LONG_LAYOUTS = {
    2: {
        "tp2": ["parallel.tensor=2"],
        "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true"],
        "pp2": ["parallel.pipeline=2"],
        "pp2-interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        "pp2-uneven": ["parallel={pipeline: 2, pipeline_layout: [3, 1]}"],
        "pp2-head-alone": ["parallel={pipeline: 2, pipeline_layout: [4, 0]}"],
        "dp2": [],
    },
    4: {
        "tp2-pp2": ["parallel.tensor=2", "parallel.pipeline=2"],
        "tp2-pp2-uneven": ["parallel={tensor: 2, sequence: true, pipeline: 2, pipeline_layout: [1, 3]}"],
        "pp4-uneven": ["parallel={pipeline: 4, pipeline_layout: [0, 1, 2, 1]}"],
    },
}


@pytest.fixture(scope="module")
def outputs(run_file: Path, base: Path) -> Path:
    """Run one process and `LAYOUTS`; return the folder of the run directories."""
    folder = run_file.parent / "layouts"
    run_ranks(1, train_here, str(run_file), [f"init.from={base}", "init.load=weights", f"output={folder}/tp1"])
    _train_in(folder, run_file, base, LAYOUTS)
    return folder


@pytest.fixture(scope="module")
def long_outputs(outputs: Path, run_file: Path, base: Path) -> Path:
    """Run also `LONG_LAYOUTS`."""
    _train_in(outputs, run_file, base, LONG_LAYOUTS)
    return outputs


def _train_in(folder: Path, run_file: Path, base: Path, layouts_by_ranks: dict[int, dict[str, list[str]]]) -> None:
    common = [f"init.from={base}", "init.load=weights"]
    for num_ranks, layouts in layouts_by_ranks.items():
        runs = [[*common, *changes, f"output={folder}/{name}"] for name, changes in layouts.items()]
        run_ranks(num_ranks, train_several, str(run_file), runs, timeout=480)


@pytest.mark.parametrize("layout", [name for layouts in LAYOUTS.values() for name in layouts])
def test_losses_do_not_depend_on_the_layout(outputs: Path, layout: str) -> None:
    _assert_equal_losses(outputs, layout)


@pytest.mark.long
@pytest.mark.parametrize("layout", [name for layouts in LONG_LAYOUTS.values() for name in layouts])
def test_losses_do_not_depend_on_other_layouts(long_outputs: Path, layout: str) -> None:
    _assert_equal_losses(long_outputs, layout)


def _assert_equal_losses(outputs: Path, layout: str) -> None:
    alone, split = read_metrics(outputs / "tp1"), read_metrics(outputs / layout)
    assert [line["step"] for line in split] == list(range(1, 21))
    assert {line["phase"] for line in split} == {"general", "qa"}
    for a, b in zip(alone, split, strict=True):
        assert b["samples_by_source"] == a["samples_by_source"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["loss_by_source"] == pytest.approx(a["loss_by_source"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.1, "the run must learn, or equal losses would prove nothing"


@pytest.mark.parametrize("preset", [pytest.param("tiny_nemotron", marks=pytest.mark.long), "tiny_llama"])
def test_random_weights_do_not_depend_on_the_layout(run_file: Path, preset: str) -> None:
    folder = run_file.parent / f"initial-{preset}"
    # fp32 rounds this rate to 0, so the checkpoint after one step has the initial weights
    still = [f"model.preset={preset}", "schedule.max_lr=1e-60", "schedule.min_lr=0", "stop_at_step=1"]
    still += ["model.tied_embeddings=true"] if preset == "tiny_llama" else []
    layouts = [[], ["parallel.tensor=2"], ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]]
    layouts += [["parallel={pipeline: 2, virtual_pipeline: 2, pipeline_layout: [2, 1, 1, 0]}"]]
    runs = [[*still, *layout, f"output={folder}/{number}"] for number, layout in enumerate(layouts)]
    run_ranks(2, train_several, str(run_file), runs)
    for number in (1, 2, 3):
        assert differing(newest(folder / "0"), newest(folder / str(number)), ignore=("optimizer.", "rng.")) == []


def test_tied_embeddings_and_full_recompute_over_a_pipeline(run_file: Path) -> None:
    folder = run_file.parent / "tied"
    common = ["model.preset=tiny_llama", "model.tied_embeddings=true", "stop_at_step=4", "recompute.granularity=full"]
    run_ranks(2, train_several, str(run_file), [
        [*common, f"output={folder}/dp2"],
        [*common, "parallel.pipeline=2", f"output={folder}/pp2"],
        [*common[:3], "parallel.tensor=2", "parallel.sequence=true", f"output={folder}/tp2-no-recompute"],
    ])  # fmt: skip
    reference = [line["loss"] for line in read_metrics(folder / "dp2")]
    for name in ("pp2", "tp2-no-recompute"):
        assert [line["loss"] for line in read_metrics(folder / name)] == pytest.approx(reference, rel=1e-5)


@pytest.mark.long  # unequal stages train above, and test_resume.py changes between them
def test_three_layers_on_two_stages(run_file: Path) -> None:
    """A run of 3 layers has the losses of one process, and resumes with another number of layers per stage."""
    folder = run_file.parent / "three"
    common = ["model.layers=3", "stop_at_step=6"]
    run_ranks(1, train_here, str(run_file), [*common, f"output={folder}/alone"])
    uneven = "parallel={pipeline: 2, pipeline_layout: [2, 1]}"
    other = "parallel={pipeline: 2, pipeline_layout: [1, 2]}"
    run_ranks(2, train_several, str(run_file), [
        [*common, uneven, f"output={folder}/uneven"],
        [*common, uneven, "stop_at_step=3", f"output={folder}/changed"],
        [*common, other, f"output={folder}/changed"],
        [*common, "parallel.tensor=2", "stop_at_step=3", f"output={folder}/from-tp2"],
        [*common, uneven, f"output={folder}/from-tp2"],
    ])  # fmt: skip
    alone = [line["loss"] for line in read_metrics(folder / "alone")]
    for name in ("uneven", "changed", "from-tp2"):
        assert [line["loss"] for line in read_metrics(folder / name)] == pytest.approx(alone, rel=1e-5)
