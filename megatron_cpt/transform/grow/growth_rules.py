"""Rules that grow each tensor of a model without changing what the model computes.

The residual stream becomes n copies of itself. A matrix that reads n copies divides by n; mean, variance and RMS of n
copies equal the values of one copy, so norms are only tiled. A tied output layer is the embedding, which is not
divided; the final norm is divided instead.

Sources: HyperCloning (arXiv 2409.12903, section 3), Net2Net (1511.05641), bert2BERT (2110.07143), LEMON (2310.07999)
for widths that are no multiple, LLaMA-Pro (2401.02415) for depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial

import numpy as np
import torch

from megatron_cpt.config import ModelConfig, Norm
from megatron_cpt.convert.mapping.names import EMBEDDING, OUTPUT_LAYER
from megatron_cpt.convert.mapping.shapes import shape_table
from megatron_cpt.files.checksum import Checksum
from megatron_cpt.transform.grow.growth_axes import (
    Axis,
    attention_axis,
    gated_axis,
    qkv_axis,
    unchanged_axis,
    width_axis,
)

IDENTITY_ZEROS = ("linear_proj.weight", "linear_proj.bias", "linear_fc2.weight", "linear_fc2.bias")
"""Tensors that are zero in an identity block, by the ends of their names."""

_DRAWN_ROWS = 64  # rows whose random numbers come from one generator


class OldTensor:
    """Tensor of the small model, read in parts.

    Args:
        read: read(first, last) returns rows [first, last).
        num_rows: number of its rows.
    """

    def __init__(self, read: Callable[[int, int], torch.Tensor], num_rows: int) -> None:
        self.read, self.num_rows = read, num_rows

    @cached_property
    def mean_row(self) -> torch.Tensor:
        """Mean over all rows, in float32."""
        total = torch.zeros_like(self.read(0, 1)[0].double())
        for start in range(0, self.num_rows, _DRAWN_ROWS):
            total += self.read(start, min(self.num_rows, start + _DRAWN_ROWS)).double().sum(dim=0)
        return (total / self.num_rows).float()


class Fill(Enum):
    """Values of fresh rows or columns."""

    ZERO = "zero"
    ONE = "one"
    MEAN = "mean"  # of the old ones
    RANDOM = "random"


@dataclass(frozen=True)
class GrowthRule:
    """Rule of one tensor.

    Attributes:
        rows, columns: origins; a vector has no columns.
        fresh_rows, fresh_columns: values without an original.
        reads_copies: whether the columns meet copies of one input, so that the matrix is divided by their number.
        scale: factor of a norm's weight or bias.
        offset: number that the stored norm weight lacks, 1 for zero-centered norms.
        std: standard deviation of random values.
    """

    rows: Axis
    columns: Axis | None = None
    fresh_rows: Fill = Fill.ZERO
    fresh_columns: Fill = Fill.ZERO
    reads_copies: bool = False
    scale: float = 1.0
    offset: float = 0.0
    std: float = 0.0


@dataclass(frozen=True)
class Noise:
    """Random numbers of one grown tensor.

    Attributes:
        ratio: standard deviation of the symmetry-breaking noise, relative to the RMS of a row of the grown matrix.
        seed, name: of the run and of the tensor. The numbers of a row depend on these and on the row only.
    """

    ratio: float
    seed: int
    name: str

    def normals(self, purpose: str, first: int, last: int, width: int) -> torch.Tensor:
        """Return (last - first, width) standard normal float32 numbers for rows [first, last)."""
        pieces = []
        for block in range(first // _DRAWN_ROWS, -(-last // _DRAWN_ROWS)):
            key = int(Checksum(f"{self.seed}/{self.name}/{purpose}/{block}".encode()).hexdigest(), 16)
            drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal((_DRAWN_ROWS, width), np.float32)
            start = block * _DRAWN_ROWS
            pieces.append(torch.from_numpy(drawn[max(0, first - start) : last - start]))
        return torch.cat(pieces)


def growth_rules(old: ModelConfig, new: ModelConfig) -> dict[str, GrowthRule]:
    """Return the rule of every tensor, with `*` for the number of the layer."""
    stream = width_axis(old.hidden, new.hidden)
    ffn = width_axis(old.ffn_hidden, new.ffn_hidden)
    fc1 = gated_axis(ffn) if old.gated else ffn
    qkv, attention, vocabulary = qkv_axis(old, new), attention_axis(old, new), unchanged_axis(old.padded_vocab)
    # LayerNorm subtracts the mean of the stream: fresh elements that equal it become zero, and do not move it.
    fill = Fill.ZERO if old.norm is Norm.RMSNORM else Fill.MEAN
    reads_stream = partial(GrowthRule, columns=stream, fresh_columns=Fill.RANDOM, reads_copies=True, std=new.init_std)
    layer = "decoder.layers.*"
    rules = {
        EMBEDDING: GrowthRule(vocabulary, stream, fresh_columns=fill),
        OUTPUT_LAYER: reads_stream(vocabulary),
        f"{layer}.self_attention.linear_qkv.weight": reads_stream(qkv, fresh_rows=Fill.RANDOM),
        f"{layer}.self_attention.linear_qkv.bias": GrowthRule(qkv),
        f"{layer}.self_attention.linear_proj.weight": GrowthRule(stream, attention, fresh_rows=fill, reads_copies=True),
        f"{layer}.self_attention.linear_proj.bias": GrowthRule(stream, fresh_rows=fill),
        f"{layer}.mlp.linear_fc1.weight": reads_stream(fc1, fresh_rows=Fill.RANDOM),
        f"{layer}.mlp.linear_fc1.bias": GrowthRule(fc1),
        f"{layer}.mlp.linear_fc2.weight": GrowthRule(stream, ffn, fresh_rows=fill, reads_copies=True),
        f"{layer}.mlp.linear_fc2.bias": GrowthRule(stream, fresh_rows=fill),
        **_norm_rules(old, new, stream),
    }
    for norm in ("q_layernorm", "k_layernorm"):  # over one head, whose size is unchanged
        for kind in ("weight", "bias"):
            rules[f"{layer}.self_attention.{norm}.{kind}"] = GrowthRule(unchanged_axis(old.head_size))
    shapes = shape_table(new)
    for name, shape in shapes.items():
        rule = rules[name]
        assert (len(rule.rows), *([len(rule.columns)] if rule.columns else [])) == shape, name
    return {name: rules[name] for name in shapes}


def _norm_rules(old: ModelConfig, new: ModelConfig, stream: Axis) -> Mapping[str, GrowthRule]:
    """Return the rules of the norms over the stream.

    Fresh elements are zero after the norm, but count in its mean square, which falls to d/d' of the old one. The norm's
    weight takes the factor sqrt(d/d'), and the model's epsilon the factor d/d'.
    """
    is_padded = bool(stream.is_fresh.any())
    factor = math.sqrt(old.hidden / new.hidden) if is_padded else 1.0
    final = 1.0 if is_padded or not old.tied_embeddings else old.hidden / new.hidden
    offset = 1.0 if old.norm is Norm.LAYERNORM1P else 0.0
    rules = {}
    for name, own in (
        ("decoder.layers.*.input_layernorm", 1.0),
        ("decoder.layers.*.pre_mlp_layernorm", 1.0),
        ("decoder.final_layernorm", final),
    ):
        rules[f"{name}.weight"] = GrowthRule(stream, fresh_rows=Fill.ONE, scale=factor * own, offset=offset)
        rules[f"{name}.bias"] = GrowthRule(stream, scale=own)
    return rules


def grow_rows(rule: GrowthRule, first: int, last: int, tensor: OldTensor, noise: Noise) -> torch.Tensor:
    """Return rows [first, last) of a grown tensor, in float32.

    Args:
        rule: of the tensor.
        tensor: the old tensor.
        noise: random numbers of the tensor.
    """
    old = _gather(rule, first, last, tensor)
    if rule.columns is None:
        return _grow_vector(rule, old, rule.rows.is_fresh[first:last])
    columns = rule.columns
    rows = old[:, columns.origins.clamp(min=0)]
    rows[:, columns.is_fresh] = 0
    if rule.reads_copies:
        rows /= columns.copies
        _add_noise(rows, columns, first, last, noise)
    _fill_columns(rule, rows, old, first, last, noise)
    fresh = rule.rows.is_fresh[first:last]
    if rule.fresh_rows is Fill.RANDOM and fresh.any():
        rows[fresh] = rule.std * noise.normals("rows", first, last, len(columns))[fresh]
    return rows


def _gather(rule: GrowthRule, first: int, last: int, tensor: OldTensor) -> torch.Tensor:
    """Return the original of each row in float32; fresh rows are the mean of all old rows, or zero."""
    origins = rule.rows.origins[first:last].tolist()
    pieces: list[torch.Tensor] = []
    start = 0
    while start < len(origins):
        end = start + 1
        step = 0 if origins[start] < 0 else 1
        while end < len(origins) and origins[end] == origins[start] + step * (end - start):
            end += 1
        if step:
            pieces.append(tensor.read(origins[start], origins[start] + end - start).float())
        else:
            row = tensor.mean_row if rule.fresh_rows is Fill.MEAN else torch.zeros_like(tensor.read(0, 1)[0].float())
            pieces.append(row.expand(end - start, *row.shape))
        start = end
    return torch.cat(pieces)


def _grow_vector(rule: GrowthRule, old: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    if rule.scale == 1.0 and rule.fresh_rows is not Fill.ONE:
        return old
    values = ((old.double() + rule.offset) * rule.scale - rule.offset).float() if rule.scale != 1.0 else old.clone()
    if rule.fresh_rows is Fill.ONE:
        values[fresh] = 1.0 - rule.offset
    return values


def _add_noise(rows: torch.Tensor, columns: Axis, first: int, last: int, noise: Noise) -> None:
    """Add N to one copy of a column and subtract it from the next one: both read the same number, so the sum is kept.

    Of an odd number of copies the last one has no noise, which also tells it apart.
    """
    pairs = int(columns.copies.max()) // 2
    if noise.ratio == 0 or pairs == 0:
        return
    normals = noise.normals("noise", first, last, pairs * columns.num_old)
    std = noise.ratio * rows.square().mean(dim=1, keepdim=True).sqrt()
    pair, is_second = columns.ordinals // 2, columns.ordinals % 2
    sign = torch.where(2 * pair + 1 < columns.copies, 1.0 - 2.0 * is_second, 0.0) * ~columns.is_fresh
    index = (pair * columns.num_old + columns.origins).clamp(0, normals.shape[1] - 1)
    rows.addcmul_(normals[:, index], std * sign)


def _fill_columns(rule: GrowthRule, rows: torch.Tensor, old: torch.Tensor, first: int, last: int, noise: Noise) -> None:
    assert rule.columns is not None
    fresh = rule.columns.is_fresh
    if not fresh.any() or rule.fresh_columns is Fill.ZERO:
        return
    if rule.fresh_columns is Fill.MEAN:
        rows[:, fresh] = old.double().mean(dim=1, keepdim=True).float()
    else:
        rows[:, fresh] = rule.std * noise.normals("columns", first, last, int(fresh.sum()))


def grow_tensor(
    name: str, tensor: torch.Tensor, old: ModelConfig, new: ModelConfig, *, noise: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """Return a whole grown tensor, in float32.

    Args:
        name: of the tensor, with `*` or a number for the layer.
        tensor: the old global tensor.
        old, new: both shapes.
        noise: ratio of the symmetry-breaking noise, see `Noise`.
        seed: of the random numbers.
    """
    parts = name.split(".")
    rule = growth_rules(old, new)[".".join("*" if part.isdigit() else part for part in parts)]
    small = OldTensor(lambda first, last: tensor[first:last], len(tensor))
    return grow_rows(rule, 0, len(rule.rows), small, Noise(noise, seed, name))
