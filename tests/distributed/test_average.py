"""Averages of checkpoints that jobs of several ranks have saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_cpt.transform.average.average_checkpoints import AverageOptions, average_checkpoints
from tests.helpers.averages import assert_is_average
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, train_here, train_several

LAYOUTS = {
    "tp2-sp-dp2": ["parallel.tensor=2", "parallel.sequence=true"],
    "tp2-pp2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "dp4-bf16": ["precision.compute=bf16"],
    "pp2-interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "pp4-uneven-plain-optimizer": [
        "parallel={pipeline: 4, pipeline_layout: [0, 1, 2, 1], distributed_optimizer: false}",
    ],
}


def test_five_layouts_equal_numpy_and_a_run_starts_from_the_average(run_file: Path, tmp_path: Path) -> None:
    runs = [
        [*changes, f"output={tmp_path}/{name}", f"seed={seed}", "stop_at_step=1"]
        for seed, (name, changes) in enumerate(LAYOUTS.items())
    ]
    run_ranks(4, train_several, str(run_file), runs, timeout=480)
    paths = [newest(tmp_path / name) for name in LAYOUTS]
    weights = (0.4, 0.2, 0.2, 0.1, 0.1)
    average_checkpoints(paths, tmp_path / "average", AverageOptions(weights=weights))
    assert_is_average(tmp_path / "average", paths, weights, torch.float32)
    start = [f"init.from={tmp_path}/average", f"output={tmp_path}/continued", "stop_at_step=1", "parallel.tensor=2"]
    run_ranks(2, train_here, str(run_file), start)
    losses = [read_metrics(tmp_path / name)[0]["loss"] for name in ("continued", *LAYOUTS)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # a model of mixed-up tensors would be far off
