"""Numbers of a step that are computed without waiting for the device, against megatron-core's own functions."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import read_metrics, train_here, train_with_hooks

STEPS = ["stop_at_step=3"]
MASKED = ["documents={eod_loss: false, eod_id: 256}"]
TIED = ["model.preset=tiny_llama", "model.tied_embeddings=true"]
PLAIN = ["parallel.distributed_optimizer=false"]
TP, PP = ["parallel.tensor=2"], ["parallel.pipeline=2"]
LAYOUTS = {
    1: {"one": []},
    2: {
        "tp2": [*TP, "parallel.sequence=true"],
        "tp2-plain": [*TP, *PLAIN],
        "pp2-tied": [*PP, *TIED],
        "pp2-interleaved": [*PP, "parallel.virtual_pipeline=2"],
        "dp2": [],
        "dp2-plain": PLAIN,
    },
    4: {"tp2-pp2-tied": [*TP, *PP, *TIED], "tp2-dp2-plain": [*TP, *PLAIN], "pp2-dp2-tied-plain": [*PP, *TIED, *PLAIN]},
}


def _norms(path: str, runs: Sequence[list[str]]) -> list[list[tuple[float, float]]]:
    """Train; return the gradient norm of each step from the squares of all ranks, and from megatron-core."""
    import torch.distributed as dist

    from megatron_cpt.optim.update import Update

    found: list[list[tuple[float, float]]] = []
    with pytest.MonkeyPatch.context() as patch:
        measure = Update.measure

        def measure_and_compare(update: Any) -> Any:
            squared, is_finite = measure(update)
            total = squared.double()
            dist.all_reduce(total)
            found[-1].append((total.float().item() ** 0.5, float(update._optimizer.get_grad_norm())))
            return squared, is_finite

        patch.setattr(Update, "measure", measure_and_compare)
        for overrides in runs:
            found.append([])
            assert train_here(path, overrides) == 0
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_the_gradient_norm_is_megatron_cores(run_file: Path, num_ranks: int) -> None:
    layouts = LAYOUTS[num_ranks]
    folder = run_file.parent / "norms"
    runs = [[*STEPS, *changes, f"output={folder}/{num_ranks}-{name}"] for name, changes in layouts.items()]
    by_rank = run_ranks(num_ranks, _norms, str(run_file), runs, timeout=480)
    for name, norms in zip(layouts, by_rank[0], strict=True):
        assert len(norms) == 3, name
        for ours, theirs in norms:
            # Of more than two numbers, the order of fp32 additions decides the last bit.
            assert ours == (theirs if num_ranks <= 2 else pytest.approx(theirs, rel=1e-6)), name
    assert all(norms == by_rank[0] for norms in by_rank)


def _train_with_both(path: str, runs: Sequence[list[str]]) -> None:
    """Train each run with our function that finalizes gradients, then with megatron-core's."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_cpt.model import build_model

    for overrides in runs:
        assert train_here(path, overrides) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_model, "finalize_gradients", finalize_model_grads)
            assert train_here(path, [f"{each}-core" if each.startswith("output=") else each for each in overrides]) == 0


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_gradients_are_divided_by_the_tokens_with_a_loss(run_file: Path, num_ranks: int) -> None:
    names = [name for name in ("one", "pp2-interleaved", "dp2") if name in LAYOUTS[num_ranks]]
    folder = run_file.parent / "tokens"
    runs = [[*STEPS, *MASKED, *LAYOUTS[num_ranks][name], f"output={folder}/{name}"] for name in names]
    run_ranks(num_ranks, _train_with_both, str(run_file), runs, timeout=480)
    for name in names:
        ours, theirs = (read_metrics(folder / f"{name}{suffix}") for suffix in ("", "-core"))
        assert len(ours) == 3
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in ours] == [line[key] for line in theirs], (name, key)


def _collection_of(path: str, overrides: Sequence[str]) -> tuple[list[bool], bool]:
    from megatron_cpt.hooks import Hook

    seen = []

    class Seen(Hook):
        def on_step(self, session: Any) -> None:
            seen.append(gc.isenabled())

    assert train_with_hooks(path, overrides, hooks=[Seen()]) == 0
    return seen, gc.isenabled()


def test_automatic_garbage_collection_is_off_during_the_steps_only(run_file: Path) -> None:
    ((during, after),) = run_ranks(1, _collection_of, str(run_file), [*STEPS, f"output={run_file.parent}/collection"])
    assert during == [False] * 3
    assert after
