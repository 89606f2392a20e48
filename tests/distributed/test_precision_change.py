"""Resumes in another number format or with another kind of optimizer start from the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import load_common_state_dict

from tests.helpers.checkpoints import read_tensors, save_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, train_here

KINDS = {
    "bf16": ["precision.compute=bf16"],
    "bf16-plain": ["precision.compute=bf16", "parallel.distributed_optimizer=false"],
    "fp32": [],
    "fp32-plain": ["parallel.distributed_optimizer=false"],
}
# each of the twelve changes from one kind to another, once
CHANGES = [
    "bf16", "fp32", "bf16", "bf16-plain", "fp32-plain", "bf16-plain", "bf16", "fp32-plain", "fp32",
    "bf16-plain", "fp32", "fp32-plain", "bf16",
]  # fmt: skip


def full_precision(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the moments and the master weights of a checkpoint; in fp32 the weights are the master weights."""
    weights = [name for name in tensors if not name.startswith(("optimizer.", "rng."))]
    found = {}
    for weight in weights:
        names = [f"optimizer.state.{kind}.{weight}" for kind in ("param", "fp32_param")]
        found[weight] = next((tensors[name] for name in names if name in tensors), tensors[weight])
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{moment} of {weight}"] = tensors[f"optimizer.state.{moment}.{weight}"]
    return found


def adam_steps(checkpoint: Path) -> list[int]:
    """Return Adam's step of each parameter group."""
    state = load_common_state_dict(str(checkpoint))["optimizer"]
    return [group["step"] for group in state.get("optimizer", state)["param_groups"]]


def test_all_numbers_survive_every_change_of_format_and_of_optimizer(run_file: Path) -> None:
    folder = run_file.parent / "formats"
    assert {*pairwise(CHANGES)} == {(a, b) for a in KINDS for b in KINDS if a != b}
    run_ranks(2, train_here, str(run_file), [*KINDS["bf16"], f"output={folder}/0", "stop_at_step=4"])
    run_ranks(2, _load_and_save_again, str(run_file), str(folder), CHANGES[1:])
    first = full_precision(read_tensors(newest(folder / "0")))
    for number, kind in enumerate(CHANGES):
        tensors = read_tensors(newest(folder / str(number)))
        numbers = full_precision(tensors)
        assert [name for name in first if not numbers[name].equal(first[name])] == [], f"{number}: {kind}"
        for name, weight in tensors.items():
            if not name.startswith(("optimizer.", "rng.")):
                assert weight.dtype == (torch.bfloat16 if kind.startswith("bf16") else torch.float32)
                assert weight.equal(first[name].to(weight.dtype)), "the weights are the master weights, rounded"
        assert adam_steps(newest(folder / str(number))) == [4, 4]


def _load_and_save_again(path: str, folder: str, kinds: Sequence[str]) -> None:
    from megatron_cpt.backend import process_groups
    from megatron_cpt.prepare import prepare_run
    from megatron_cpt.train.run_files import record
    from megatron_cpt.train.setup import setup

    for number, kind in enumerate(kinds):
        prepared = prepare_run(path, [*KINDS[kind], f"output={folder}/{number}"], need_files=True)
        with process_groups(prepared.config.parallel) as ranks:
            session = setup(prepared.config, prepared.plan, ranks, eod_id=None, allow=["precision"])
            target = Path(folder) / str(number + 1) / "checkpoints"
            save_checkpoint(target, session.state.step, session.model.chunks, session.optimizer, record(session))


def test_a_bf16_run_that_goes_on_in_fp32_trains_from_its_master_weights(run_file: Path, tmp_path: Path) -> None:
    for name, compute in (("changed", "fp32"), ("quiet", "bf16")):
        first, then = (f"precision.compute={kind}" for kind in ("bf16", compute))
        output = f"output={tmp_path}/{name}"
        run_ranks(2, train_here, str(run_file), [first, output, "stop_at_step=6"])
        run_ranks(2, train_here, str(run_file), [then, output, "stop_at_step=9"], ["precision"])
    changed, quiet = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("changed", "quiet"))
    assert changed[:6] == quiet[:6]
    assert changed[6:] != quiet[6:]
    torch.testing.assert_close(torch.tensor(changed), torch.tensor(quiet), rtol=0.01, atol=0)
