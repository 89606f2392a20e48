"""Runs that move between this package and Megatron-LM with weights, moments, Adam's step and the schedule.

Megatron-LM's part is played by megatron-core, called as Megatron-LM calls it (`tests/helpers/megatron_lm.py`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import orjson
import pytest
from megatron.core.dist_checkpointing import load_common_state_dict

from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.megatron.megatron_lm_export import export_megatron_lm, model_arguments
from megatron_cpt.convert.source import open_source_checkpoint
from tests.helpers.checkpoints import differing, read_tensors, save_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, train_here

RUNS = {"fp32": (1, []), "bf16-tp2": (2, ["parallel.tensor=2", "precision.compute=bf16"])}


def _groups(checkpoint: Path) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = load_common_state_dict(str(checkpoint))["optimizer"]["optimizer"]["param_groups"]
    return groups


def _load_as_megatron_lm(run: str, changes: list[str], checkpoint: str, folder: str) -> dict[str, Any]:
    """Load an export on one rank; return what Megatron-LM continues with, and the tensors that differ."""
    from megatron_cpt.backend import process_groups
    from megatron_cpt.prepare import prepare_run
    from tests.helpers.megatron_lm import Training

    config = prepare_run(run, [*changes, "parallel.tensor=1"], need_files=True).config
    source = open_source_checkpoint(Path(checkpoint), with_optimizer=True)
    with process_groups(config.parallel):
        training = Training.build(config, max_lr=1e-3, min_lr=1e-5, steps=20)
        iteration, arguments = training.load(Path(folder))
        tensors = {
            name if name in source.specs else f"optimizer.state.{name}": t for name, t in training.tensors().items()
        }
        return {
            "iteration": iteration,
            "arguments": vars(arguments),
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in training.optimizer.param_groups
            ],
            "scheduler": training.scheduler.state_dict(),
            "names": set(tensors),
            "differing": [n for n, t in tensors.items() if not t.equal(source.read(n, 0, source.specs[n].shape[0]))],
        }


@pytest.mark.parametrize("kind", ["bf16-tp2", pytest.param("fp32", marks=pytest.mark.long)])
def test_megatron_lm_resumes_a_run(run_file: Path, tmp_path: Path, kind: str) -> None:
    num_ranks, changes = RUNS[kind]
    output = tmp_path / "run"
    run_ranks(num_ranks, train_here, str(run_file), [*changes, f"output={output}", "stop_at_step=3"])
    checkpoint = newest(output)
    assert [(g["max_lr"], g["min_lr"]) for g in _groups(checkpoint)] == [(1e-3, 1e-5)] * 2
    report = export_megatron_lm(output, tmp_path / "megatron")
    assert (report.iteration, (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text()) == (3, "3\n")
    (loaded,) = run_ranks(1, _load_as_megatron_lm, str(run_file), changes, str(checkpoint), str(tmp_path / "megatron"))
    source = open_source_checkpoint(checkpoint, with_optimizer=True)
    assert loaded["names"] == set(source.specs)
    assert loaded["differing"] == []
    assert (loaded["iteration"], loaded["arguments"]["consumed_train_samples"]) == (3, 3 * 8)
    rate = orjson.loads((checkpoint / "state.json").read_bytes())["next_rate"]
    assert loaded["scheduler"]["num_steps"] == 3 * 8
    for group, decay in zip(loaded["groups"], (0.1, 0.0), strict=True):
        assert (group["step"], group["max_lr"], group["min_lr"], group["weight_decay"]) == (3, 1e-3, 1e-5, decay)
        assert group["lr"] == pytest.approx(rate, rel=1e-12)
    # the export is a source of an import like any checkpoint of Megatron-LM
    assert open_source_checkpoint(tmp_path / "megatron").model.layers == source.model.layers


def _start_from_megatron_lm(run: str, folder: str) -> None:
    """Train two steps as Megatron-LM does and save, import that, load it into a run of ours and save that."""
    from megatron_cpt.backend import process_groups, seed_everything
    from megatron_cpt.prepare import prepare_run
    from megatron_cpt.train.run_files import record
    from megatron_cpt.train.setup import setup
    from tests.helpers.megatron_lm import Training

    base = Path(folder)
    prepared = prepare_run(run, [f"output={base}/unused"], need_files=True)
    with process_groups(prepared.config.parallel):
        seed_everything(1, pipeline_rank=0)
        training = Training.build(prepared.config, max_lr=6e-4, min_lr=6e-5, steps=50)
        training.step(0)
        training.step(1)
        training.save(base / "megatron", 2, argparse.Namespace(**model_arguments(prepared.config.model)))
    import_checkpoint(base / "megatron", base / "imported", ImportOptions(optimizer=True))
    init = [f"init.from={base}/imported", "init.load=weights+optimizer"]
    prepared = prepare_run(run, [f"output={base}/run", *init], need_files=True)
    with process_groups(prepared.config.parallel) as ranks:
        session = setup(prepared.config, prepared.plan, ranks, eod_id=None)
        save_checkpoint(base / "loaded" / "checkpoints", 0, session.model.chunks, session.optimizer, record(session))


def test_a_run_continues_the_moments_of_megatron_lm(run_file: Path, tmp_path: Path) -> None:
    run_ranks(1, _start_from_megatron_lm, str(run_file), str(tmp_path))
    loaded = newest(tmp_path / "loaded")
    assert differing(tmp_path / "imported", loaded, ignore=("rng.",)) == []
    moments = [name for name in read_tensors(loaded) if name.startswith("optimizer.state.exp_avg_sq.")]
    assert len(moments) > 10
    assert [(group["step"], group["max_lr"]) for group in _groups(loaded)] == [(2, 1e-3)] * 2
    init = [f"init.from={tmp_path}/imported", "init.load=weights+optimizer"]
    run_ranks(1, train_here, str(run_file), [f"output={tmp_path}/run", *init, "stop_at_step=1"])
    assert read_metrics(tmp_path / "run")[0]["step"] == 1


def test_a_resume_under_another_schedule_saves_its_own_rates(run_file: Path, tmp_path: Path) -> None:
    output = [f"output={tmp_path}/run"]
    run_ranks(1, train_here, str(run_file), [*output, "stop_at_step=1"])
    changed = [*output, "schedule.max_lr=5.0e-4", "schedule.min_lr=1.0e-6", "stop_at_step=2"]
    run_ranks(1, train_here, str(run_file), changed, ["schedule"])
    assert [(g["step"], g["max_lr"], g["min_lr"]) for g in _groups(newest(tmp_path / "run"))] == [(2, 5e-4, 1e-6)] * 2
