"""Megatron checkpoints in the wild: torch_dist under any naming, mp_rank_* files, corrupt and hostile files."""

from __future__ import annotations

import argparse
import enum
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.checkpoint.torchfile.torch_file import open_torch_file
from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.mapping.names import te_name
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.convert.mapping.tensors import Mosaic, Piece
from megatron_cpt.convert.megatron.legacy import LegacyWeights
from megatron_cpt.convert.megatron.torch_dist_reader import TorchDistWeights
from megatron_cpt.convert.source import open_source_checkpoint
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.planning.cost.parameters import count_parameters

LLAMA = ModelConfig(
    layers=4,
    hidden=32,
    ffn_hidden=24,
    heads=4,
    kv_groups=2,
    head_dim=8,
    vocab=128,
    activation="silu",
    gated=True,
    norm="rmsnorm",
)
LLAMA_YAML = """
{layers: 4, hidden: 32, ffn_hidden: 24, heads: 4, kv_groups: 2, head_dim: 8, vocab: 128, activation: silu, gated: true,
 norm: rmsnorm}
"""
ARGUMENTS = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 8,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "norm_epsilon": 1e-5,
    "add_bias_linear": False,
}


def weights(model: ModelConfig = LLAMA) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_tensors(model).items()}


def save_torch_dist(folder: Path, state: dict[str, Any]) -> Path:
    """Save tensors with torch's writer, in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack layers along a first dimension, as megatron-core does for homogeneous models."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        key = name if ".layers." not in name else "decoder.layers." + name.split(".", 3)[3]
        found.setdefault(key, []).append(tensor)
    return {key: torch.stack(parts) if ".layers." in key else parts[0] for key, parts in found.items()}


def equal(reader: Any, tensors: dict[str, torch.Tensor]) -> bool:
    whole = all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    rows = all(torch.equal(reader.read(name, slice(3, 9)), tensor[3:9]) for name, tensor in tensors.items())
    return set(reader.tensors) == set(tensors) and whole and rows


def test_number_of_parameters():
    assert sum(tensor.numel() for tensor in weights().values()) == count_parameters(LLAMA).total


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
@pytest.mark.parametrize("naming", ["local", "te"])
@pytest.mark.parametrize("layers", ["stacked", "single"])
def test_torch_dist_namings(tmp_path: Path, prefix: str, naming: str, layers: str) -> None:
    tensors = weights()
    named = {te_name(name) if naming == "te" else name: tensor for name, tensor in tensors.items()}
    state = {f"{prefix}{key}": t for key, t in (stacked(named) if layers == "stacked" else named).items()}
    others = {
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.zeros(2),
        f"{prefix}decoder.layers.mlp.linear_fc1._extra_state": [None],
        f"{prefix}decoder.layers.mlp.linear_fc1.amax_history": torch.zeros(4, 3, 16),
        f"{prefix}decoder.layers.mlp.linear_fc2.fp8_forward.amax_history": torch.zeros(4, 17, 3),
        "rng_state": [1],
    }
    save_torch_dist(tmp_path / "iter_0000010", {**state, **others})
    assert equal(TorchDistWeights(tmp_path), tensors)


def test_model_of_megatron_lm_arguments(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path / "iter_0000010", stacked(weights()))
    torch.save({"args": argparse.Namespace(**ARGUMENTS, rampup_batch_size=None)}, folder / "common.pt")
    opened = open_source_checkpoint(tmp_path)
    assert opened.kind == "torch_dist"
    assert opened.model == LLAMA


def test_model_of_a_bridge_run_config(tmp_path: Path) -> None:
    save_torch_dist(tmp_path / "iter_0000010", {f"model.{key}": t for key, t in stacked(weights()).items()})
    (tmp_path / "run_config.yaml").write_text(
        "model:\n  _target_: megatron.bridge.models.llama.LlamaModelProvider\n  num_layers: 4\n  hidden_size: 32\n"
        "  ffn_hidden_size: 24\n  num_attention_heads: 4\n  num_query_groups: 2\n  kv_channels: 8\n"
        "  gated_linear_unit: true\n  normalization: RMSNorm\n  layernorm_epsilon: 1.0e-05\n"
        "  activation_func: !!python/name:torch.nn.functional.silu ''\n  add_bias_linear: false\n"
        "  position_embedding_type: rope\n"
    )
    assert open_source_checkpoint(tmp_path).model == LLAMA
    text = (tmp_path / "run_config.yaml").read_text()
    (tmp_path / "run_config.yaml").write_text(text.replace("functional.silu", "functional.mish"))
    with pytest.raises(RefusedError, match=r"activation_func .*mish"):
        open_source_checkpoint(tmp_path)


def test_a_checkpoint_without_a_config(tmp_path: Path) -> None:
    save_torch_dist(tmp_path, stacked(weights()))
    with pytest.raises(UserError, match="--model"):
        open_source_checkpoint(tmp_path)
    (tmp_path / "model.yaml").write_text(LLAMA_YAML)
    assert open_source_checkpoint(tmp_path, named_model=str(tmp_path / "model.yaml")).model == LLAMA
    (tmp_path / "model.yaml").write_text("{layers: 5, hidden: 32, ffn_hidden: 24, heads: 4, kv_groups: 2, vocab: 128}")
    with pytest.raises(RefusedError, match=r"decoder\.layers\.4\.input_layernorm\.weight: missing"):
        open_source_checkpoint(tmp_path, named_model=str(tmp_path / "model.yaml"))


def test_the_padding_of_megatron_lm_is_cut_and_ours_is_added(tmp_path: Path) -> None:
    tensors = weights()
    tensors["embedding.word_embeddings.weight"] = torch.randn(300, 32)
    tensors["output_layer.weight"] = torch.randn(300, 32)
    folder = save_torch_dist(tmp_path, stacked(tensors))
    torch.save({"args": argparse.Namespace(**ARGUMENTS, vocab_size=260)}, folder / "common.pt")
    opened = open_source_checkpoint(tmp_path)
    assert (opened.model.vocab, opened.model.padded_vocab) == (260, 384)
    rows = opened.read("output_layer.weight", 0, 384)
    assert torch.equal(rows[:300], tensors["output_layer.weight"])
    assert not rows[300:].any()
    assert not opened.read("output_layer.weight", 310, 320).any()


@pytest.mark.parametrize("fault", ["cut", "missing", "chunk", "link", "climbs"])
def test_damaged_torch_dist(tmp_path: Path, fault: str) -> None:
    save_torch_dist(tmp_path / "ckpt", stacked(weights()))
    data = tmp_path / "ckpt" / "__0_0.distcp"
    with open(tmp_path / "ckpt" / ".metadata", "rb") as file:
        metadata = pickle.load(file)  # noqa: S301 - this test's own
    key = "decoder.layers.mlp.linear_fc1.weight"
    if fault == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif fault == "missing":
        data.unlink()
    elif fault == "link":
        data.rename(tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
    elif fault == "chunk":
        metadata.state_dict_metadata[key].size = torch.Size([4, 49, 32])
    else:
        for info in metadata.storage_data.values():
            object.__setattr__(info, "relative_path", "../ckpt/__0_0.distcp")
    (tmp_path / "ckpt" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RefusedError, match=r"distcp|linear_fc1"):  # noqa: PT012 - found on opening, or on reading
        reader = TorchDistWeights(tmp_path / "ckpt")
        for name in reader.tensors:
            reader.read(name)


def _piece(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Piece:
    return Piece(offsets, sizes, lambda: StoredTensor(Path("none"), 0, sizes, torch.float32))


@pytest.mark.parametrize(
    ("pieces", "what"),
    [
        ([((0, 0), (2, 4)), ((3, 0), (1, 4))], "12 of its 16 elements"),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], "overlap"),
        ([((0, 0), (4, 2)), ((0, 2), (4, 3))], "exceeds its shape"),
        ([], "no pieces"),
    ],
)
def test_pieces_must_cover_each_element_once(pieces: list[Any], what: str) -> None:
    with pytest.raises(RefusedError, match=what):
        Mosaic("w", (4, 4), torch.float32, [_piece(*piece) for piece in pieces]).check()


# ------------------------------------------------------------------------------------------ mp_rank_*


class Backend(enum.Enum):
    """Stand-in for an enum of megatron-core."""

    FLASH = 1


def save_legacy(
    folder: Path, tensors: dict[str, torch.Tensor], tp: int, pp: int, vpp: int = 1, arguments: Any = ARGUMENTS
) -> Path:
    """Write global tensors as the files of Megatron-LM's ranks, with every rank's rows computed here."""
    layers_a_chunk = LLAMA.layers // (pp * vpp)
    for p in range(pp):
        for t in range(tp):
            state: dict[str, Any] = {"args": argparse.Namespace(**arguments), "iteration": 7}
            for v in range(vpp):
                first = (v * pp + p) * layers_a_chunk
                chunk: dict[str, Any] = {"decoder.layers.0.mlp.linear_fc1._extra_state": None}
                for name, tensor in tensors.items():
                    if name.startswith("embedding") and (p, v) != (0, 0):
                        continue
                    is_end = name.startswith(("output_layer", "decoder.final"))
                    if is_end and (p, v) != (pp - 1, vpp - 1):
                        continue
                    if ".layers." in name:
                        layer = int(name.split(".")[2])
                        if not first <= layer < first + layers_a_chunk:
                            continue
                        name = name.replace(f".{layer}.", f".{layer - first}.", 1)
                    chunk[te_name(name)] = _shard(name, tensor, t, tp).clone()
                state["model" if vpp == 1 else f"model{v}"] = chunk
            state["optimizer"] = {"param_groups": [{"lr": 1.0}], "backend": Backend.FLASH}
            rank = folder / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
            rank.mkdir(parents=True)
            torch.save(state, rank / "model_optim_rng.pt")
    return folder


def _shard(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    if "linear_fc1" in name:
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    if "linear_qkv" in name or name.startswith(("embedding", "output_layer")):
        return tensor.chunk(size)[rank]
    if "linear_proj" in name or "linear_fc2" in name:
        return tensor.chunk(size, dim=1)[rank]
    return tensor


@pytest.fixture
def megatron_enum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the enum into a module that the reader cannot import."""
    module = types.ModuleType("megatron.training.made_up")
    Backend.__module__ = "megatron.training.made_up"
    module.Backend = Backend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.training.made_up", module)


@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2)])
@pytest.mark.usefixtures("megatron_enum")
def test_legacy_layouts(tmp_path: Path, tp: int, pp: int, vpp: int) -> None:
    tensors = weights()
    save_legacy(tmp_path / "iter_0000007", tensors, tp, pp, vpp)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert equal(LegacyWeights(tmp_path), tensors)
    opened = open_source_checkpoint(tmp_path)
    assert (opened.kind, opened.model) == ("legacy", LLAMA)


@pytest.mark.usefixtures("megatron_enum")
def test_legacy_tied_embeddings(tmp_path: Path) -> None:
    """The last pipeline stage holds a copy of the embedding as its output layer."""
    tensors = weights()
    tensors["output_layer.weight"] = tensors["embedding.word_embeddings.weight"]
    tied = {**ARGUMENTS, "untie_embeddings_and_output_weights": False}
    save_legacy(tmp_path, tensors, 2, 2, arguments=tied)
    opened = open_source_checkpoint(tmp_path)
    assert opened.model.tied_embeddings
    assert "output_layer.weight" not in opened.specs


@pytest.mark.usefixtures("megatron_enum")
def test_legacy_copies_that_differ_and_missing_ranks(tmp_path: Path) -> None:
    save_legacy(tmp_path, weights(), 2, 2)
    file = tmp_path / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(state, file)
    with pytest.raises(RefusedError, match=r"final_layernorm\.weight: a copy on every"):
        LegacyWeights(tmp_path)
    file.unlink()
    file.parent.rmdir()
    with pytest.raises(RefusedError, match="mp_rank_01_001"):
        LegacyWeights(tmp_path)


class Bomb:
    """Object whose unpickling creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("place", ["rank", "metadata", "common", "piece"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, place: str) -> None:
    bomb, folder = Bomb(tmp_path / "mark"), tmp_path / "ckpt"
    if place == "rank":
        (folder / "mp_rank_00").mkdir(parents=True)
        torch.save({"args": bomb, "model": weights()}, folder / "mp_rank_00" / "model_optim_rng.pt")
    else:
        save_torch_dist(folder, stacked(weights()))
    if place == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(bomb))
    elif place == "common":
        torch.save({"args": bomb}, folder / "common.pt")
    elif place == "piece":
        torch.save(bomb, folder / "__0_0.distcp")
        (folder / "model.yaml").write_text(LLAMA_YAML)
    with pytest.raises(RefusedError, match=r"io\.open|no file of torch\.save|cut|damaged"):  # noqa: PT012
        opened = open_source_checkpoint(folder, named_model=str(folder / "model.yaml") if place == "piece" else None)
        opened.read("output_layer.weight", 0, 1)
    assert not (tmp_path / "mark").exists()


def test_torch_files_of_other_kinds(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(RefusedError, match=r"before torch 1\.6"):
        open_torch_file(tmp_path / "old.pt")
    torch.save({"w": torch.ones(3, 4).t()}, tmp_path / "strided.pt")
    with pytest.raises(RefusedError, match="not contiguous"):
        open_torch_file(tmp_path / "strided.pt")
    view = torch.arange(10.0)[4:7]
    torch.save({"view": view, "scalar": torch.tensor(3), "empty": torch.empty(0, 4)}, tmp_path / "fine.pt")
    found = open_torch_file(tmp_path / "fine.pt")
    assert torch.equal(found["view"].read(), view)
    assert found["scalar"].read() == 3
    assert found["empty"].read().shape == (0, 4)
