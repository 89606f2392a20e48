"""Reader of Megatron-LM's older layout: `mp_rank_XX(_YYY)/model_optim_rng.pt`, one file per rank of TP x PP.

The ranks' tensors are merged to global ones. The files are pickles of `torch.save`; `torch_file` reads their structure
without running code. Tensors stay on the disk until their rows are read, so a rank's optimizer state costs nothing.

The row cuts follow megatron-core's tensor_parallel/layers.py and transformer/mlp.py. The layers per pipeline stage
follow transformer/transformer_block.py: with virtual stages, `model0` of all stages comes before `model1`. Example: 8
layers, PP 2, VPP 2: stage 0 holds layers 0 and 1 (model0) and 4 and 5 (model1), stage 1 holds 2, 3, 6 and 7.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.checkpoint.torchfile.torch_file import open_torch_file
from megatron_cpt.convert.mapping.names import EMBEDDING, LAYER_NAME, OUTPUT_LAYER, local_name
from megatron_cpt.convert.mapping.tensors import Mosaic, MosaicWeights, Piece
from megatron_cpt.convert.megatron.torch_dist_reader import newest_iteration
from megatron_cpt.errors import RefusedError

_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_COMMON = ("optimizer", "opt_param_scheduler")
_SPLIT_ROWS = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias", EMBEDDING, OUTPUT_LAYER)
_SPLIT_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


class LegacyWeights(MosaicWeights):
    """Weights of a checkpoint in this layout.

    Attributes:
        folder: folder of the iteration.
        files: files of all ranks.
        arguments: Megatron-LM's arguments, as plain values.
        common: what the first rank stores besides the model: the arguments, and its part of the optimizer's state.
        tensors: tensors by the local layer spec's names, one per layer.

    Raises:
        RefusedError: a rank is missing, or the files do not belong together.
    """

    def __init__(self, path: Path) -> None:
        self.folder = _find(path) or path
        ranks = _ranks(self.folder)
        self.files = [file for _, file in sorted(ranks.items())]
        states = {rank: open_torch_file(file) for rank, file in ranks.items()}
        for rank, state in states.items():
            if not isinstance(state, Mapping):
                raise RefusedError(f"{ranks[rank]}: holds no checkpoint of Megatron-LM; copy the file again")
        first = next(iter(states.values()))
        namespace = first.get("args")  # read as the dictionary that it holds
        arguments = getattr(namespace, "state", None)
        self.arguments: Mapping[str, Any] = arguments if isinstance(arguments, Mapping) else {}
        num_tensor, num_pipeline = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
        self.common = {**{key: first[key] for key in _COMMON if key in first}, "args": self.arguments}
        missing = [
            f"mp_rank_{t:02d}_{p:03d}" for t in range(num_tensor) for p in range(num_pipeline) if (t, p) not in ranks
        ]
        if missing:
            raise RefusedError(f"{self.folder}: no {', '.join(missing)}; copy the files of all ranks")
        super().__init__(_merge(self.folder, states, num_tensor, num_pipeline, self.arguments))


def is_legacy(path: Path) -> bool:
    """Return whether a folder, or its newest `iter_*`, has this layout."""
    return _find(path) is not None


def _find(path: Path) -> Path | None:
    for folder in (path, newest_iteration(path)):
        if folder is not None and any(_RANK.fullmatch(entry.name) for entry in folder.iterdir()):
            return folder
    return None


def _ranks(folder: Path) -> dict[tuple[int, int], Path]:
    ranks = {}
    for entry in sorted(folder.iterdir()):
        match = _RANK.fullmatch(entry.name)
        if match is None:
            continue
        file = entry / _FILE
        if entry.is_symlink() or file.is_symlink() or not file.is_file():
            raise RefusedError(f"{file}: missing, or a link; copy the files of all ranks")
        ranks[int(match[1]), int(match[2] or 0)] = file
    return ranks


def _merge(
    folder: Path,
    states: Mapping[tuple[int, int], Mapping[str, Any]],
    num_tensor: int,
    num_pipeline: int,
    arguments: Mapping[str, Any],
) -> dict[str, Mosaic]:
    """Return global tensors from the model chunks of all ranks, in the order in which the pipeline runs them."""
    chunk_keys = [key for key in ("model", *(f"model{n}" for n in range(64))) if key in states[0, 0]]
    if not chunk_keys:
        raise RefusedError(f"{folder}: no model in {_FILE}; the checkpoint holds no weights")
    is_gated, is_tied = bool(arguments.get("swiglu")), arguments.get("untie_embeddings_and_output_weights") is False
    tensors: dict[str, Mosaic] = {}
    first_layer = 0
    for key in chunk_keys:
        for stage in range(num_pipeline):
            chunks = [_chunk(folder, states[rank, stage], key) for rank in range(num_tensor)]
            num_layers = 0
            for name in chunks[0]:
                match = LAYER_NAME.fullmatch(name)
                global_name = name
                if match is not None:
                    num_layers = max(num_layers, int(match[1]) + 1)
                    global_name = f"decoder.layers.{first_layer + int(match[1])}.{match[2]}"
                if is_tied and global_name == OUTPUT_LAYER:
                    continue  # copy of the embedding on the last stage
                if not all(name in chunk for chunk in chunks):
                    raise RefusedError(
                        f"{folder}: {name} is missing in the file of a tensor-parallel rank; copy all files again"
                    )
                if global_name in tensors:
                    raise RefusedError(f"{folder}: {global_name} is in two pipeline stages; do not use this checkpoint")
                tensors[global_name] = _join(global_name, [chunk[name] for chunk in chunks], is_gated)
            first_layer += num_layers
    return tensors


def _chunk(folder: Path, state: Mapping[str, Any], key: str) -> dict[str, StoredTensor]:
    model = state.get(key)
    if isinstance(model, Mapping) and "language_model" in model:
        raise RefusedError(
            f"{folder}: a checkpoint from before megatron-core (language_model.encoder...); first convert it with "
            "Megatron-LM's tools/checkpoint/convert.py --saver core"
        )
    if not isinstance(model, Mapping):
        raise RefusedError(f"{folder}: no {key} in the file of one of the ranks; copy the files of all ranks again")
    return {
        local_name(name.removeprefix("module.")): tensor
        for name, tensor in model.items()
        if isinstance(tensor, StoredTensor) and "_extra_state" not in name
    }


def _join(name: str, shards: list[StoredTensor], is_gated: bool) -> Mosaic:
    """Return one global tensor from the shards of the tensor-parallel ranks.

    Raises:
        RefusedError: the shards have different shapes or dtypes, or are copies that differ.
    """
    first = shards[0]
    if any(shard.shape != first.shape or shard.dtype != first.dtype for shard in shards):
        found = ", ".join(f"{shard.dtype} {shard.shape}" for shard in shards)
        raise RefusedError(f"{name}: the tensor-parallel ranks hold {found}; copy the files of one checkpoint")
    if name.endswith(_SPLIT_COLUMNS):
        shape: tuple[int, ...] = (first.shape[0], sum(shard.shape[1] for shard in shards))
        pieces = [_piece_at(shard, 0, number * first.shape[1]) for number, shard in enumerate(shards)]
    elif name.endswith(_SPLIT_ROWS):
        rows = first.shape[0]
        shape = (rows * len(shards), *first.shape[1:])
        if is_gated and ".linear_fc1." in name:
            half = rows // 2  # a rank holds [its gate; its up], the global tensor is [all gates; all ups]
            pieces = [
                _piece_at(shard.rows(part * half, (part + 1) * half), part * half * len(shards) + number * half)
                for part in (0, 1)
                for number, shard in enumerate(shards)
            ]
        else:
            pieces = [_piece_at(shard, number * rows) for number, shard in enumerate(shards)]
    else:
        if len({shard.read().reshape(-1).view(torch.uint8).numpy().tobytes() for shard in shards}) > 1:
            raise RefusedError(
                f"{name}: a copy on every tensor-parallel rank, but the copies differ; do not use this checkpoint"
            )
        shape, pieces = first.shape, [_piece_at(first, 0)]
    return Mosaic(name, shape, first.dtype, pieces)


def _piece_at(shard: StoredTensor, row: int, column: int = 0) -> Piece:
    offsets = (row, column)[: len(shard.shape)]
    return Piece(offsets, shard.shape, lambda: shard)
