"""Lines of a family's table of weights: `Copy`, `Qkv` and `Gated`, with `*` for the number of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.mapping.rules import RowBlock, TensorRule


class Pattern(Protocol):
    """Line of a family's table, for one kind of Megatron tensor."""

    @property
    def megatron(self) -> str:
        """Name of the Megatron tensor, with `*` for the number of the layer."""

    def rule(self, model: ModelConfig, shape: tuple[int, ...]) -> TensorRule:
        """Return the rule for a model in which the Megatron tensor has this shape, with `*` in its names."""


@dataclass(frozen=True)
class Copy:
    """One Hugging Face tensor, unchanged, or with rows of padding after it.

    Example of `padded_vocab`: a vocabulary of 257 is padded to 384. Rows 0 to 256 of the Megatron embedding are the
    Hugging Face tensor, rows 257 to 383 are zero. An export drops them.
    """

    megatron: str
    hf: str
    padded_vocab: bool = False

    def rule(self, model: ModelConfig, shape: tuple[int, ...]) -> TensorRule:
        """See `Pattern`."""
        hf_shape = (model.vocab, *shape[1:]) if self.padded_vocab else shape
        blocks = (RowBlock(0, 0, 0, hf_shape[0]),)
        return TensorRule(self.megatron, shape, (self.hf,), (hf_shape,), blocks, self.padded_vocab)


@dataclass(frozen=True)
class Qkv:
    """Queries, keys and values of an attention, fused by key/value group.

    Example: 4 heads of size 8 in 2 groups. `q_proj` has 32 rows, `k_proj` and `v_proj` have 16. Rows of `linear_qkv`:

        group 0:   0 to 15 = q rows 0 to 15    16 to 23 = k rows 0 to 7    24 to 31 = v rows 0 to 7
        group 1:  32 to 47 = q rows 16 to 31   48 to 55 = k rows 8 to 15   56 to 63 = v rows 8 to 15
    """

    megatron: str
    q: str
    k: str
    v: str

    def rule(self, model: ModelConfig, shape: tuple[int, ...]) -> TensorRule:
        """See `Pattern`."""
        size, groups = model.head_size, model.num_kv_groups
        query_rows = model.heads // groups * size
        blocks = []
        for group in range(groups):
            start = group * (query_rows + 2 * size)
            blocks += [
                RowBlock(start, 0, group * query_rows, query_rows),
                RowBlock(start + query_rows, 1, group * size, size),
                RowBlock(start + query_rows + size, 2, group * size, size),
            ]
        hf_shapes = tuple((groups * rows, *shape[1:]) for rows in (query_rows, size, size))
        return TensorRule(self.megatron, shape, (self.q, self.k, self.v), hf_shapes, tuple(blocks))


@dataclass(frozen=True)
class Gated:
    """Both branches of a gated MLP; the branch that goes through the activation comes first.

    Example: `ffn_hidden` 24. Rows 0 to 23 of `linear_fc1` are `gate_proj`, rows 24 to 47 are `up_proj`. A rank of TP 2
    then takes rows 0 to 11 and 24 to 35.
    """

    megatron: str
    gate: str
    up: str

    def rule(self, model: ModelConfig, shape: tuple[int, ...]) -> TensorRule:
        """See `Pattern`."""
        half = model.ffn_hidden
        hf_shapes = ((half, *shape[1:]), (half, *shape[1:]))
        blocks = (RowBlock(0, 0, 0, half), RowBlock(half, 1, 0, half))
        return TensorRule(self.megatron, shape, (self.gate, self.up), hf_shapes, blocks)
