"""Import of Megatron-LM's checkpoints with their optimizer: values beside the tensors, moments, refusals."""

from __future__ import annotations

import argparse
import pickle
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_cpt.checkpoint.torchfile.torch_file import open_torch_file
from megatron_cpt.checkpoint.torchfile.unpickle import read_metadata
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.source import open_source_checkpoint
from megatron_cpt.errors import RefusedError, UserError
from tests.helpers.checkpoints import read_tensors
from tests.unit.convert.megatron.test_convert_megatron import ARGUMENTS, save_torch_dist, stacked, weights

FIXTURE = Path(__file__).parents[3] / "fixtures" / "megatron_core_0.19" / "checkpoint"
EMBEDDING = "embedding.word_embeddings.weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_with_optimizer(
    folder: Path, groups: Any = ({"wd_mult": 1.0, "step": 7},), kinds: tuple[str, ...] = (*MOMENTS, "param")
) -> Path:
    """Save weights and random optimizer state as Megatron-LM with `fully_reshardable` names it."""
    state = stacked(weights())
    for number, kind in enumerate(kinds, start=1):
        state |= {f"optimizer.state.{kind}.{key}": t + number for key, t in stacked(weights()).items()}
    save_torch_dist(folder, state)
    common = {"args": argparse.Namespace(**ARGUMENTS), "optimizer": {"optimizer": {"param_groups": list(groups)}}}
    torch.save(common, folder / "common.pt")
    return folder


def test_megatron_core_019_keeps_its_arguments_in_a_shard() -> None:
    opened = open_source_checkpoint(FIXTURE)
    model = opened.model
    assert (model.layers, model.hidden, model.vocab, model.gated, model.norm) == (2, 16, 60, True, "rmsnorm")


def test_a_shard_whose_arguments_run_code_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURE, tmp_path / "copy") / "iter_0000002"
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save([{"args": Bomb()}], folder / "__9_0.distcp")
    metadata = read_metadata(folder)
    place = metadata.storage_data[MetadataIndex("common_state/shard_0_1")]
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, (folder / "__9_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises((RefusedError, UserError)):
        open_source_checkpoint(tmp_path / "copy")
    place.relative_path = "../__9_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RefusedError, match="outside of the checkpoint"):
        open_source_checkpoint(tmp_path / "copy")
    assert not marker.exists()


def test_import_with_the_optimizer(tmp_path: Path) -> None:
    """All moments and master weights arrive; the 4 padded rows of Megatron-LM become 68 rows of zeros."""
    report = import_checkpoint(FIXTURE, tmp_path / "imported", ImportOptions(optimizer=True))
    assert report.optimizer_step == 2
    expected, found = read_tensors(FIXTURE / "iter_0000002"), read_tensors(tmp_path / "imported")
    assert expected.keys() - found.keys() == set()
    for name, tensor in expected.items():
        if name.endswith((EMBEDDING, "output_layer.weight")):
            assert found[name].shape[0] == 128
            if name.startswith("optimizer."):
                assert not found[name][60:].any()
            tensor, found[name] = tensor[:60], found[name][:60]
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name
    groups = open_torch_file(tmp_path / "imported" / "common.pt")["optimizer"]["optimizer"]["param_groups"]
    assert [(group["wd_mult"], group["step"]) for group in groups] == [(1.0, 2), (0.0, 2)]
    state = orjson.loads((tmp_path / "imported" / "state.json").read_bytes())
    assert state["content"] == "weights+optimizer"


def test_the_optimizer_stays_in_fp32_whatever_the_weights_become(tmp_path: Path) -> None:
    save_with_optimizer(tmp_path / "megatron")
    import_checkpoint(tmp_path / "megatron", tmp_path / "imported", ImportOptions(optimizer=True, dtype="bf16"))
    found = read_tensors(tmp_path / "imported")
    assert found["output_layer.weight"].dtype == torch.bfloat16
    for number, kind in enumerate((*MOMENTS, "param"), start=1):
        assert found[f"optimizer.state.{kind}.output_layer.weight"].equal(weights()["output_layer.weight"] + number)


def test_a_plain_optimizer_in_fp32_has_the_weights_as_master_weights(tmp_path: Path) -> None:
    save_with_optimizer(tmp_path / "megatron", kinds=MOMENTS)
    import_checkpoint(tmp_path / "megatron", tmp_path / "imported", ImportOptions(optimizer=True))
    found = read_tensors(tmp_path / "imported")
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert found[f"optimizer.state.param.{name}"].equal(stacked(weights())[name])


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([{"pre_wd_mult": 0.0, "pre_lr_mult": 1.0, "step": torch.tensor(3.0)}], {"wd_mult": 0.0, "step": 3}),
        ([{"wd_mult": 1.0, "step": 5, "params": [0], "unknown": argparse.Namespace()}], {"wd_mult": 1.0, "step": 5}),
    ],
)
def test_groups_of_other_programs(tmp_path: Path, groups: Any, expected: dict[str, Any]) -> None:
    opened = open_source_checkpoint(save_with_optimizer(tmp_path, groups), with_optimizer=True)
    assert opened.groups is not None
    (group,) = opened.groups
    assert group == {
        "bias_correction": True, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, **expected
    }  # fmt: skip


def test_what_has_no_optimizer_that_fits_is_refused_by_name(tmp_path: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(RefusedError, match=match):
            import_checkpoint(folder, tmp_path / "imported", ImportOptions(optimizer=True))
        assert not (tmp_path / "imported").exists()

    common = {"args": argparse.Namespace(**ARGUMENTS)}
    nothing = save_torch_dist(tmp_path / "nothing", stacked(weights()))
    torch.save(common, nothing / "common.pt")
    refused(nothing, "holds no moments")
    key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_0.exp_avg"
    buckets = save_torch_dist(tmp_path / "buckets", {**stacked(weights()), key: torch.zeros(9)})
    torch.save(common, buckets / "common.pt")
    refused(buckets, r"bucket_idx_0\.exp_avg.*--dist-ckpt-optim-fully-reshardable")
    refused(save_with_optimizer(tmp_path / "no_step", [{"wd_mult": 1.0}]), "do not say Adam's step")
    refused(save_with_optimizer(tmp_path / "no_groups", []), "no parameter groups")
    flat = save_with_optimizer(tmp_path / "flat")
    other = {f"optimizer.state.exp_avg.{key}": t.flatten() for key, t in stacked(weights()).items()}
    state = {**read_tensors(flat), **other}
    shutil.rmtree(flat)
    save_torch_dist(flat, state)
    torch.save({**common, "optimizer": {"optimizer": {"param_groups": [{"step": 1}]}}}, flat / "common.pt")
    refused(flat, r"optimizer\.state\.exp_avg\.")


def test_optimizer_and_new_tokens_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--add-tokens or with --optimizer"):
        import_checkpoint(FIXTURE, tmp_path / "x", ImportOptions(optimizer=True, new_tokens=("a",)))
