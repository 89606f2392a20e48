"""The lines of a family's table: `Copy`, `Qkv`, `Gated`; `*` stands for a layer's number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.mapping.rules import RowBlock, TensorRule
from megatron_cpt.convert.mapping.shapes import megatron_shape


class Pattern(Protocol):
    """A line of a family's table."""

    @property
    def megatron(self) -> str:
        """The Megatron name, `*` for the layer."""

    def rule(self, model: ModelConfig, layer: int | None) -> TensorRule:
        """The rule for one layer (None: outside the layers)."""


@dataclass(frozen=True)
class Copy:
    """One Hugging Face tensor as it is; with `padded_vocab`, rows of padding behind it."""

    megatron: str
    hf: str
    padded_vocab: bool = False

    def rule(self, model: ModelConfig, layer: int | None) -> TensorRule:
        """See `Pattern`."""
        shape = megatron_shape(self.megatron, model)
        hf_shape = (model.vocab, *shape[1:]) if self.padded_vocab else shape
        return TensorRule(
            megatron=_in_layer(self.megatron, layer),
            megatron_shape=shape,
            hf=(_in_layer(self.hf, layer),),
            hf_shapes=(hf_shape,),
            blocks=(RowBlock(0, 0, 0, hf_shape[0]),),
            padded_vocab=self.padded_vocab,
        )


@dataclass(frozen=True)
class Qkv:
    """Queries, keys and values, interleaved by key/value group: the group's queries, its key, its value."""

    megatron: str
    q: str
    k: str
    v: str

    def rule(self, model: ModelConfig, layer: int | None) -> TensorRule:
        """See `Pattern`."""
        shape = megatron_shape(self.megatron, model)
        size, groups = model.head_size, model.num_kv_groups
        queries = model.heads // groups * size
        blocks = []
        for group in range(groups):
            start = group * (queries + 2 * size)
            blocks += [
                RowBlock(start, 0, group * queries, queries),
                RowBlock(start + queries, 1, group * size, size),
                RowBlock(start + queries + size, 2, group * size, size),
            ]
        rows = (groups * queries, groups * size, groups * size)
        return TensorRule(
            megatron=_in_layer(self.megatron, layer),
            megatron_shape=shape,
            hf=tuple(_in_layer(name, layer) for name in (self.q, self.k, self.v)),
            hf_shapes=tuple((count, *shape[1:]) for count in rows),
            blocks=tuple(blocks),
        )


@dataclass(frozen=True)
class Gated:
    """The two branches of a gated MLP: the one under the activation first (globally; not [gate; up] rank by rank)."""

    megatron: str
    gate: str
    up: str

    def rule(self, model: ModelConfig, layer: int | None) -> TensorRule:
        """See `Pattern`."""
        shape = megatron_shape(self.megatron, model)
        half = model.ffn_hidden
        return TensorRule(
            megatron=_in_layer(self.megatron, layer),
            megatron_shape=shape,
            hf=(_in_layer(self.gate, layer), _in_layer(self.up, layer)),
            hf_shapes=((half, *shape[1:]), (half, *shape[1:])),
            blocks=(RowBlock(0, 0, 0, half), RowBlock(half, 1, 0, half)),
        )


def _in_layer(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace("*", str(layer))
