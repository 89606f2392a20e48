"""Plan of a torch_dist checkpoint: its files, the tensors in each, and where tensors are cut into pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_cpt.convert.job import group_by_size
from megatron_cpt.convert.mapping.names import EMBEDDING, LAYER_NAME, OUTPUT_LAYER, weight_name

MAX_PIECE_BYTES = 16 << 20
"""Largest piece of a tensor. A piece is read and loaded whole, so this bounds the memory per thread.

Up to 32 MiB the C library keeps freed memory for the next piece. Larger blocks are mapped page by page each time, which
takes ten times as long as the read itself.
"""

_COLUMN_PARALLEL = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")
_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a global tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Target:
    """Parallel layout that loads the checkpoint fastest. Every other layout can load it too.

    Attributes:
        tensor, pipeline: tensor- and pipeline-parallel sizes.
        shard_bytes: size of a file; more if a single tensor is larger. Files are written and verified in parallel.
    """

    tensor: int = 1
    pipeline: int = 1
    shard_bytes: int = 256_000_000


@dataclass(frozen=True)
class FilePlan:
    """One file, the names of the tensors in it, and their size."""

    name: str
    tensors: tuple[str, ...]
    num_bytes: int


def plan_files(specs: Mapping[str, TensorSpec], num_layers: int, target: Target) -> list[FilePlan]:
    """Assign tensors to files so that no file holds tensors of two pipeline stages.

    Example: with 4 layers, 2 stages and files large enough, `__0_0.distcp` holds the embedding and layers 0 and 1,
    `__1_0.distcp` holds layers 2 and 3, the final norm and the output layer.
    """
    plans: list[FilePlan] = []
    layers_per_stage = math.ceil(num_layers / target.pipeline)
    for stage in range(target.pipeline):
        names = _tensors_of_stage(specs, stage, layers_per_stage, target.pipeline)
        groups = group_by_size({name: specs[name].num_bytes for name in names}, target.shard_bytes)
        for number, group in enumerate(groups):
            num_bytes = sum(specs[name].num_bytes for name in group)
            plans.append(FilePlan(f"__{stage}_{number}.distcp", tuple(group), num_bytes))
    return plans


def _tensors_of_stage(specs: Mapping[str, TensorSpec], stage: int, layers_per_stage: int, num_stages: int) -> list[str]:
    """Return the tensors of one stage in the order of the layers, so that a rank reads a file from front to back."""

    def stage_and_position(name: str) -> tuple[int, int]:
        name = weight_name(name)
        if match := LAYER_NAME.fullmatch(name):
            layer = int(match[1])
            return min(layer // layers_per_stage, num_stages - 1), layer
        return (0, -1) if name.startswith("embedding.") else (num_stages - 1, len(specs))

    names = [name for name in specs if stage_and_position(name)[0] == stage]
    return sorted(names, key=lambda name: stage_and_position(name)[1])


def row_cuts(name: str, spec: TensorSpec, tensor_parallel: int) -> list[int]:
    """Return the rows at which a tensor is cut: between tensor-parallel ranks, and so that no piece is too large.

    Example: `linear_qkv` with 256 rows for TP 2 is cut at [0, 128, 256]. `linear_fc1` is cut twice as often, at
    [0, 64, 128, 192, 256]: if the MLP is gated, each rank needs its part of the gate and its part of the other half.
    """
    num_rows = spec.shape[0]
    parts = 1
    if name.endswith(_COLUMN_PARALLEL) or weight_name(name) in (EMBEDDING, OUTPUT_LAYER):
        parts = 2 * tensor_parallel if ".linear_fc1." in name else tensor_parallel
    while num_rows % parts:  # the target cannot load this model anyway; another layout will
        parts -= 1
    step = num_rows // parts
    max_rows = max(1, MAX_PIECE_BYTES // max(1, spec.num_bytes // max(1, num_rows)))
    cuts = [0]
    for start in range(0, num_rows, step):
        pieces = math.ceil(step / max_rows)
        cuts += [start + step * number // pieces for number in range(1, pieces + 1)]
    return cuts


def column_cuts(name: str, spec: TensorSpec, tensor_parallel: int) -> list[int]:
    """Return the columns at which a tensor is cut: between tensor-parallel ranks, for row-parallel matrices."""
    if len(spec.shape) < 2:
        return [0, 0]
    columns = spec.shape[1]
    parts = tensor_parallel if name.endswith(_ROW_PARALLEL) and columns % tensor_parallel == 0 else 1
    return [columns * number // parts for number in range(parts + 1)]
