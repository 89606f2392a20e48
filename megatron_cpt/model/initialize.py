"""Random weights that depend on the seed and the name of a weight, and on nothing else.

megatron-core draws weights in the order in which modules are built, so another pipeline split is another model. Here
every weight has a generator of its own, keyed by (seed, name, layer), and each rank keeps its part of the whole: the
same model at any TP x PP x VPP. The names and the parts come from `sharded_state_dict`, the mapping that checkpoints
use, so there is one truth about which rank holds what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from megatron_cpt.config import ModelConfig
from megatron_cpt.model.transformer_config import output_std

_WRITES_TO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(chunks: Sequence[GPTModel], model: ModelConfig, seed: int) -> None:
    """Fill every matrix with N(0, init_std), scaled by 1/sqrt(2 layers) where it writes to the residual stream.

    Biases start at zero; norms keep the identity that they are built with.
    """
    for chunk in chunks:
        for shard in _shards(chunk.sharded_state_dict()):
            if shard.key.endswith("bias") and "norm" not in shard.key:
                shard.data.zero_()
            elif shard.key.endswith("weight") and "norm" not in shard.key:
                std = output_std(model) if shard.key.endswith(_WRITES_TO_RESIDUAL) else model.init_std
                values = _part_of_normal(shard, seed, std)
                shard.data.copy_(values)
                # Of a weight in FP8 Transformer Engine keeps what it was built with, for the fp32 master weight.
                if hasattr(shard.data, "get_high_precision_init_val"):
                    shard.data.get_high_precision_init_val().copy_(values)


def _shards(value: Any) -> Iterator[ShardedTensor]:
    """Every sharded tensor below a state dict; a gated MLP's factory is opened into its two halves (views)."""
    if isinstance(value, ShardedTensorFactory):
        yield from _shards(value.build())
    elif isinstance(value, ShardedTensor):
        if value.data is not None:
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _shards(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _shards(entry)


def _part_of_normal(shard: ShardedTensor, seed: int, std: float) -> torch.Tensor:
    """This rank's part of the whole random weight, shape of `shard.data`."""
    prepended = shard.prepend_axis_num  # leading axes of the global shape that count layers, not elements of a weight
    layer = tuple(shard.global_offset[:prepended])
    digest = hashlib.blake2b(repr((seed, shard.key, layer)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    whole = torch.empty(shard.global_shape[prepended:], dtype=torch.float32)
    whole.normal_(0.0, std, generator=generator)
    place = tuple(
        slice(start, start + length)
        for start, length in zip(shard.global_offset[prepended:], shard.data.shape, strict=True)
    )
    return whole[place]
