"""Imported checkpoints in jobs of several ranks: logits at TP2 x PP2, training in any layout, Megatron-LM's files."""

from __future__ import annotations

import argparse
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.logits import LogitsReport, compare_logits
from megatron_cpt.convert.mapping.names import te_name
from megatron_cpt.convert.megatron.legacy import LegacyWeights
from megatron_cpt.convert.megatron.torch_dist_plan import Target
from megatron_cpt.convert.megatron.torch_dist_reader import TorchDistWeights
from megatron_cpt.convert.source import open_source_checkpoint
from tests.helpers.hf_models import FAMILY_CONFIGS, save_hf_model
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import read_metrics, small_run, train_here, train_several


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create FAMILY/hf and FAMILY/checkpoint for every family, cut for TP 2 x PP 2."""
    base = tmp_path_factory.mktemp("convert")
    for family in FAMILY_CONFIGS:
        hf = save_hf_model(base / family / "hf", family, num_hidden_layers=4, vocab_size=259)
        import_checkpoint(hf, base / family / "checkpoint", ImportOptions(target=Target(2, 2, 100_000)))
    return base


def _job_of_four(base: str) -> dict[str, Any]:
    """Compare logits of every family, then save one model in megatron-core's and in Megatron-LM's format."""
    folder = Path(base)
    reports = {
        family: compare_logits(folder / family / "hf", folder / family / "checkpoint", tensor=2, pipeline=2)
        for family in FAMILY_CONFIGS
    }
    _save_both_ways(folder)
    return reports


def _save_both_ways(folder: Path) -> None:
    from megatron.core import dist_checkpointing

    from megatron_cpt.backend import process_groups
    from megatron_cpt.checkpoint.loading.inference_model import inference_run, open_checkpoint
    from megatron_cpt.checkpoint.state.state_dicts import model_state, unwrap
    from megatron_cpt.model.build_model import build_model

    saved = open_checkpoint(folder / "llama" / "checkpoint")
    run = inference_run(saved, ["parallel.tensor=2", "parallel.pipeline=2", "precision.compute=fp32"])
    with process_groups(run.parallel) as ranks:
        chunks = build_model(run).chunks
        # megatron-core's loader, not ours, to show that an import is a checkpoint in its format
        state = dist_checkpointing.load(model_state(chunks), str(folder / "llama" / "checkpoint"))
        unwrap(chunks[0]).load_state_dict(state["model0"], strict=False)
        rank_folder = folder / "legacy" / f"mp_rank_{ranks.tensor_rank:02d}_{ranks.pipeline_rank:03d}"
        rank_folder.mkdir(parents=True)
        arguments = argparse.Namespace(swiglu=True, num_layers=4)
        torch.save({"args": arguments, "model": unwrap(chunks[0]).state_dict()}, rank_folder / "model_optim_rng.pt")
        if dist.get_rank() == 0:
            (folder / "torch_dist").mkdir()
        dist.barrier()
        _save_by_megatron_core(model_state(chunks), folder / "torch_dist")


def _save_by_megatron_core(state: dict[str, Any], folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if getattr(filesystem_async, "_results_queue", False) is None:
        # megatron-core would start a process for this queue, whose imports outlive the test
        filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(folder))


def _logits_from_te_names(base: str, families: list[str]) -> dict[str, LogitsReport | None]:
    """Import checkpoints that megatron-core saved under Transformer Engine's names, layer by layer; compare logits."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_cpt.backend import process_groups
    from megatron_cpt.config import ParallelConfig

    reports = {}
    for family in families:
        folder = Path(base) / family
        source = open_source_checkpoint(folder / "hf")
        tensors = {te_name(name): source.read(name, 0, spec.shape[0]) for name, spec in source.specs.items()}
        state = {
            name: ShardedTensor.from_rank_offsets(f"model.{name}", tensor, replica_id=0)
            for name, tensor in tensors.items()
        }
        (folder / "te").mkdir()
        with process_groups(ParallelConfig()):
            _save_by_megatron_core(state, folder / "te")
        (folder / "model.yaml").write_text(yaml.safe_dump(source.model.model_dump(mode="json")))
        options = ImportOptions(model=str(folder / "model.yaml"))
        import_checkpoint(folder / "te", folder / "from_te", options)
        reports[family] = compare_logits(folder / "hf", folder / "from_te")
    return reports


def test_logits_from_the_names_of_transformer_engine(imported: Path) -> None:
    families = ["nemotron", "llama", "qwen3"]  # LayerNorm1P with biases; a gated MLP; norms over queries and keys
    (reports,) = run_ranks(1, _logits_from_te_names, str(imported), families)
    keys = TorchDistWeights(imported / "nemotron" / "te").tensors
    assert "decoder.layers.3.pre_mlp_layernorm.bias" in keys  # in the file: mlp.linear_fc1.layer_norm_bias
    for family in families:
        assert reports[family].max_difference < 1e-4, family
        assert reports[family].top1_agreement == 1.0


@pytest.fixture(scope="module")
def reports(imported: Path) -> dict[str, LogitsReport]:
    results: list[dict[str, LogitsReport]] = run_ranks(4, _job_of_four, str(imported), timeout=300)
    return results[0]


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_logits_at_tp2_pp2(reports: dict[str, LogitsReport], family: str) -> None:
    report = reports[family]
    assert report.max_difference < 1e-4
    assert report.mean_kl < 1e-8
    assert report.top1_agreement == 1.0
    assert (report.layout, report.num_tokens) == ("TP 2 x PP 2", 54)


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize("kind", ["torch_dist", "legacy"])
def test_what_megatron_core_wrote_is_what_was_imported(imported: Path, kind: str) -> None:
    """Weights are unchanged after megatron-core has loaded them at TP2 x PP2 and saved them in both of its formats."""
    written = (TorchDistWeights if kind == "torch_dist" else LegacyWeights)(imported / kind)
    source = open_source_checkpoint(imported / "llama" / "hf")
    assert set(written.tensors) == set(source.specs)
    for name, spec in source.specs.items():
        assert torch.equal(written.read(name), source.read(name, 0, spec.shape[0])), name


def test_training_starts_from_an_import_in_any_layout(imported: Path, tmp_path: Path) -> None:
    checkpoint = imported / "nemotron" / "checkpoint"
    run = small_run(tmp_path, model=_model(checkpoint), init={"from": str(checkpoint)})
    layouts = {
        "tp2": ["parallel.tensor=2"],
        "pp2": ["parallel.pipeline=2"],
        "vpp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    }
    runs = [["stop_at_step=1", f"output={tmp_path}/{name}", *changes] for name, changes in layouts.items()]
    run_ranks(2, train_several, str(run), runs)
    losses = [read_metrics(tmp_path / name)[0]["loss"] for name in layouts]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_an_import_has_no_optimizer_state(imported: Path, tmp_path: Path) -> None:
    checkpoint = imported / "nemotron" / "checkpoint"
    init = {"from": str(checkpoint), "load": "weights+optimizer"}
    run = small_run(tmp_path, model=_model(checkpoint), init=init)
    with pytest.raises(RankError, match=r"imported from weights alone.*set init\.load=weights"):
        run_ranks(1, train_here, str(run))


def _model(checkpoint: Path) -> dict[str, Any]:
    model: ModelConfig = open_source_checkpoint(checkpoint).model
    return model.model_dump(mode="json")
