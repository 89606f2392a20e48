"""Origins of the rows and columns of a grown tensor: for each new index, the old index that it copies.

Example: hidden 2 -> 4 makes each element of the residual stream a copy of an old one, with the origins 0, 1, 0, 1.
Hidden 2 -> 3 has the origins 0, 1, FRESH: the third element has no original.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_cpt.config import ModelConfig

FRESH = -1
"""Origin of a row or column that the old tensor does not have."""


@dataclass(frozen=True)
class Axis:
    """One dimension of a grown tensor.

    Attributes:
        origins: old index per new index, or `FRESH`.
        num_old: size of the dimension before.
    """

    origins: torch.Tensor
    num_old: int

    def __len__(self) -> int:
        return len(self.origins)

    @cached_property
    def is_fresh(self) -> torch.Tensor:
        """True per new index without an original."""
        return self.origins == FRESH

    @cached_property
    def copies(self) -> torch.Tensor:
        """Number of copies of its original, per new index; 1 for fresh ones."""
        counts = torch.bincount(self.origins[~self.is_fresh], minlength=self.num_old)
        return torch.where(self.is_fresh, 1, counts[self.origins.clamp(min=0)])

    @cached_property
    def ordinals(self) -> torch.Tensor:
        """Number of earlier copies of the same original, per new index; 0 for fresh ones.

        Example: the origins 0, 1, 0, 1 have the ordinals 0, 0, 1, 1.
        """
        ordinals = torch.zeros_like(self.origins)
        order = torch.argsort(self.origins, stable=True)
        ordered = self.origins[order]
        ordinals[order] = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
        return torch.where(self.is_fresh, 0, ordinals)


def axis(origins: Iterable[int], num_old: int) -> Axis:
    """Return the axis with these origins."""
    return Axis(torch.tensor(list(origins), dtype=torch.int64), num_old)


def unchanged_axis(size: int) -> Axis:
    """Return the axis of a dimension that does not grow."""
    return Axis(torch.arange(size), size)


def width_axis(old: int, new: int) -> Axis:
    """Return whole copies one after another, or the old elements and then fresh ones if `old` does not divide `new`."""
    origins = torch.arange(new)
    return Axis(origins % old if new % old == 0 else torch.where(origins < old, origins, FRESH), old)


def gated_axis(branch: Axis) -> Axis:
    """Return the rows of a gated `linear_fc1`, whose two branches grow separately.

    Tiled as one block, the grown first half would hold gate and up of half the width.
    """
    up = torch.where(branch.is_fresh, FRESH, branch.origins + branch.num_old)
    return Axis(torch.cat([branch.origins, up]), 2 * branch.num_old)


@dataclass(frozen=True)
class HeadOrigins:
    """Old head and old key/value group of each new one.

    Attributes:
        heads: old query head per new query head, or `FRESH`.
        groups: old group per new group, or `FRESH`.
    """

    heads: list[int]
    groups: list[int]


def head_origins(old: ModelConfig, new: ModelConfig) -> HeadOrigins:
    """Return the origins of heads and groups.

    Whole factors copy: each head occurs equally often, always beside a copy of its own key and value. Example: heads
    0 1 | 2 3 in 2 groups become 0 1 | 2 3 | 0 1 | 2 3 in 4 groups, or 0 1 0 1 | 2 3 2 3 in 2 groups. Other sizes add
    fresh heads at the end of each group, and fresh groups.
    """
    size, new_size = old.heads // old.num_kv_groups, new.heads // new.num_kv_groups
    if new.heads % old.heads == 0 and new.num_kv_groups % old.num_kv_groups == 0:
        copies = list(range(size)) * (new.heads // old.heads)  # of the heads of one old group
        groups = [group % old.num_kv_groups for group in range(new.num_kv_groups)]
        parts = [group // old.num_kv_groups for group in range(new.num_kv_groups)]
        heads = [
            origin * size + head
            for origin, part in zip(groups, parts, strict=True)
            for head in copies[part * new_size : (part + 1) * new_size]
        ]
        return HeadOrigins(heads, groups)
    groups = [group if group < old.num_kv_groups else FRESH for group in range(new.num_kv_groups)]
    heads = [
        group * size + head if group != FRESH and head < size else FRESH for group in groups for head in range(new_size)
    ]
    return HeadOrigins(heads, groups)


def attention_axis(old: ModelConfig, new: ModelConfig) -> Axis:
    """Return the columns of `linear_proj`: the elements of all query heads."""
    origins = head_origins(old, new)
    return _blocks(origins.heads, old.head_size, old.heads * old.head_size)


def qkv_axis(old: ModelConfig, new: ModelConfig) -> Axis:
    """Return the rows of `linear_qkv`: per group its query heads, its key and its value."""
    origins, per_group = head_origins(old, new), old.heads // old.num_kv_groups
    new_per_group = new.heads // new.num_kv_groups
    blocks = []
    for number, group in enumerate(origins.groups):
        for head in origins.heads[number * new_per_group : (number + 1) * new_per_group]:
            blocks.append(FRESH if head == FRESH else head // per_group * (per_group + 2) + head % per_group)
        key = FRESH if group == FRESH else group * (per_group + 2) + per_group
        blocks += [key, FRESH if group == FRESH else key + 1]
    return _blocks(blocks, old.head_size, (old.heads + 2 * old.num_kv_groups) * old.head_size)


def _blocks(blocks: list[int], size: int, num_old: int) -> Axis:
    """Return the axis of blocks of `size` elements by the numbers of the old blocks."""
    starts = torch.tensor(blocks, dtype=torch.int64)[:, None]
    return Axis(torch.where(starts == FRESH, FRESH, starts * size + torch.arange(size)).flatten(), num_old)


@dataclass(frozen=True)
class LayerOrigin:
    """Old layer of a new one; `is_identity` marks an inserted copy that adds nothing to the residual stream."""

    layer: int
    is_identity: bool


def layer_origins(old: int, new: int) -> list[LayerOrigin]:
    """Return the origin of each layer: every old layer in order, and identity copies spread evenly between them.

    A copy follows its original, as in LLaMA-Pro (arXiv 2401.02415, section 3.2), which puts copies of the last layer of
    a group behind the group. Example: 4 -> 6 layers are 0, 1, copy of 1, 2, 3, copy of 3.
    """
    origins = []
    for layer in range(old):
        copies = (layer + 1) * (new - old) // old - layer * (new - old) // old
        origins += [LayerOrigin(layer, number > 0) for number in range(1 + copies)]
    return origins
