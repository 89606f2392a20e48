"""Which file of a checkpoint holds which tensors, and where tensors are cut, for the layout that will load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_cpt.convert.mapping.tensors import EMBEDDING, OUTPUT_LAYER, layer_of

MAX_PIECE_BYTES = 16 << 20
"""A piece is read and loaded whole: this bounds the memory of a thread, here and in whoever loads it.

Up to 32 MiB the C library keeps freed memory for the next piece. Larger ones come from the system page by page each
time, which takes ten times as long as the read itself.
"""

_COLUMN_PARALLEL = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias")
_ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class Form:
    """A tensor to write: its global shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Target:
    """Which ranks will load the checkpoint; a matter of speed only.

    Attributes:
        tensor, pipeline: sizes of the parallel groups.
        shard_bytes: size of a file; more where a single tensor needs it. Files are written and verified in parallel.
    """

    tensor: int = 1
    pipeline: int = 1
    shard_bytes: int = 256_000_000


@dataclass(frozen=True)
class FilePlan:
    """One file and the tensors in it."""

    name: str
    tensors: tuple[str, ...]


def plan_files(forms: Mapping[str, Form], num_layers: int, target: Target) -> list[FilePlan]:
    """Share the tensors out to files, stage by stage of the target's pipeline."""
    files: list[FilePlan] = []
    per_stage = math.ceil(num_layers / target.pipeline)
    for stage in range(target.pipeline):
        bins: list[list[str]] = []
        room = 0
        for name in _in_order(forms, stage, per_stage, target.pipeline):
            if not bins or forms[name].num_bytes > room:
                bins.append([])
                room = target.shard_bytes
            bins[-1].append(name)
            room -= forms[name].num_bytes
        files += [FilePlan(f"__{stage}_{number}.distcp", tuple(names)) for number, names in enumerate(bins)]
    return files


def _in_order(forms: Mapping[str, Form], stage: int, per_stage: int, num_stages: int) -> list[str]:
    """The tensors of one stage by layer: a file is read from front to back."""

    def place(name: str) -> tuple[int, int]:
        layer = layer_of(name)
        if layer is not None:
            return min(layer // per_stage, num_stages - 1), layer
        return (0, -1) if name.startswith("embedding.") else (num_stages - 1, len(forms))

    return sorted((name for name in forms if place(name)[0] == stage), key=lambda name: place(name)[1])


def row_cuts(name: str, form: Form, tensor_parallel: int) -> list[int]:
    """Where rows are cut: at the ranks, and so that no piece is too large."""
    rows = form.shape[0]
    parts = 1
    if name.endswith(_COLUMN_PARALLEL) or name in (EMBEDDING, OUTPUT_LAYER):
        # A gated MLP is [gate; up] and each rank has its part of both: twice as many cuts serve the plain one too.
        parts = 2 * tensor_parallel if ".linear_fc1." in name else tensor_parallel
    while rows % parts:  # a layout that does not divide: it will be loaded by another one
        parts -= 1
    step = rows // parts
    most = max(1, MAX_PIECE_BYTES // max(1, form.num_bytes // max(1, rows)))
    cuts = [0]
    for start in range(0, rows, step):
        pieces = math.ceil(step / most)
        cuts += [start + step * number // pieces for number in range(1, pieces + 1)]
    return cuts


def column_cuts(name: str, form: Form, tensor_parallel: int) -> list[int]:
    """Where columns are cut: at the ranks of a row-parallel matrix."""
    if len(form.shape) < 2:
        return [0, 0]
    columns = form.shape[1]
    parts = tensor_parallel if name.endswith(_ROW_PARALLEL) and columns % tensor_parallel == 0 else 1
    return [columns * number // parts for number in range(parts + 1)]


def total_bytes(forms: Mapping[str, Form]) -> int:
    """Size of all tensors."""
    return sum(form.num_bytes for form in forms.values())


def file_bytes(plan: FilePlan, forms: Mapping[str, Form]) -> int:
    """Size of a file's tensors."""
    return sum(forms[name].num_bytes for name in plan.tensors)
