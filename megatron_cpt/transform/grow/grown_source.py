"""Tensors of a grown model, computed from the small checkpoint while they are written."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.mapping.names import LAYER_NAME
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.convert.megatron.torch_dist_plan import TensorSpec
from megatron_cpt.convert.source import SourceCheckpoint
from megatron_cpt.transform.grow.growth_axes import layer_origins
from megatron_cpt.transform.grow.growth_rules import (
    IDENTITY_ZEROS,
    GrowthRule,
    Noise,
    OldTensor,
    grow_rows,
    growth_rules,
)

_BLOCK_BYTES = 4 << 20  # of float32 rows that are computed at a time


def grown_source(
    source: SourceCheckpoint, target: ModelConfig, *, noise: float, seed: int, dtype: torch.dtype | None = None
) -> SourceCheckpoint:
    """Return a source of the grown model's tensors; its `read` computes them in float32.

    Args:
        source: the small checkpoint.
        target: shape to grow to, see `growth_target`.
        noise: ratio of the symmetry-breaking noise.
        seed: of noise and fresh weights.
        dtype: of the grown weights; None: the dtype of each small one.
    """
    layers = layer_origins(source.model.layers, target.layers)
    old_tensors = {
        name: OldTensor(lambda first, last, name=name: source.read(name, first, last), spec.shape[0])  # type: ignore[misc]
        for name, spec in source.specs.items()
    }

    @cache
    def rules() -> dict[str, GrowthRule]:  # at the first read, so that a shape too large for the disk is refused before
        return growth_rules(source.model, target)

    def origin(name: str) -> tuple[str, str, bool]:
        """Return the rule's name, the old tensor's name, and whether the tensor is zero in an identity block."""
        match = LAYER_NAME.fullmatch(name)
        if match is None:
            return name, name, False
        layer = layers[int(match[1])]
        is_zero = layer.is_identity and name.endswith(IDENTITY_ZEROS)
        return f"decoder.layers.*.{match[2]}", f"decoder.layers.{layer.layer}.{match[2]}", is_zero

    def read(name: str, first: int, last: int) -> torch.Tensor:
        shape = specs[name].shape
        rule_name, old_name, is_zero = origin(name)
        rows = torch.zeros((last - first, *shape[1:]))
        if is_zero:
            return rows
        step = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
        for start in range(first, last, step):
            end = min(last, start + step)
            rows[start - first : end - first] = grow_rows(
                rules()[rule_name], start, end, old_tensors[old_name], Noise(noise, seed, name)
            )
        return rows

    specs = {
        name: TensorSpec(shape, dtype or source.specs[origin(name)[1]].dtype)
        for name, shape in expected_tensors(target).items()
    }
    origins = {name: f"{name}, grown from {origin(name)[1]}" for name in specs}
    return replace(source, model=target, specs=specs, read=read, origins=origins, groups=None)
