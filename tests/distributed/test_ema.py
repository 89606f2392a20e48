"""The moving average of the weights: equal to a plain loop, in every layout, through kills, and without effect on training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    path = small_run(folder, validation={"every": 5, "batches": 1, "sources": {"web": str(folder / "data" / "web")}})
    return path


def averages(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the average of each weight by the weight's name."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


def master_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the fp32 weights that the optimizer updates; in an fp32 run these are the weights."""
    weights = [name for name in tensors if not name.startswith(("optimizer.", "rng."))]
    names = {name: [f"optimizer.state.{kind}.{name}" for kind in ("param", "fp32_param")] for name in weights}
    return {name: next((tensors[n] for n in names[name] if n in tensors), tensors[name]) for name in weights}


def plain_loop(output: Path, steps: int) -> dict[str, np.ndarray]:
    """Return the average over the weights of every step, computed in fp64 from the checkpoints of every step."""
    found = {}
    for step in range(1, steps + 1):
        tensors = master_weights(read_tensors(output / "checkpoints" / f"step-{step:08d}"))
        for name, weight in tensors.items():
            now = weight.numpy().astype(np.float64)
            if step == 1:
                found[name] = now
            elif step % 2 == 0:
                found[name] = DECAY * found[name] + (1 - DECAY) * now
    return found
