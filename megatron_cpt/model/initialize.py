"""Random weights that depend only on the seed and the name of a weight.

megatron-core draws weights in the order in which modules are built, so a different pipeline split gives a different
model. Here each weight has its own generator, keyed by (seed, name, layer). Each rank draws the full weight and keeps
its shard, so the model is the same at any TP x PP x VPP (tensor, pipeline and virtual pipeline parallelism). Names and
shards come from `sharded_state_dict`, which checkpoints use too.
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
    """Fill matrices with N(0, init_std), those that write to the residual stream with N(0, init_std / sqrt(2 layers)).

    Biases become zero; norms keep their initial identity.
    """
    for chunk in chunks:
        for shard in _shards(chunk.sharded_state_dict()):
            if shard.key.endswith("bias") and "norm" not in shard.key:
                shard.data.zero_()
            elif shard.key.endswith("weight") and "norm" not in shard.key:
                std = output_std(model) if shard.key.endswith(_WRITES_TO_RESIDUAL) else model.init_std
                values = _draw_shard(shard, seed, std)
                shard.data.copy_(values)
                # Transformer Engine keeps the unrounded values of an FP8 weight, from which the fp32 master is made.
                if hasattr(shard.data, "get_high_precision_init_val"):
                    shard.data.get_high_precision_init_val().copy_(values)


def _shards(value: Any) -> Iterator[ShardedTensor]:
    """Yield all sharded tensors of a state dict; a gated MLP's factory gives its two halves (views)."""
    if isinstance(value, ShardedTensorFactory):
        yield from _shards(value.build())
    elif isinstance(value, ShardedTensor):
        if value.data is not None:
            yield value
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _shards(entry)


def _draw_shard(shard: ShardedTensor, seed: int, std: float) -> torch.Tensor:
    """Draw the full random weight and return this rank's shard of it."""
    prepended = shard.prepend_axis_num  # leading axes of the global shape that count layers
    layer = tuple(shard.global_offset[:prepended])
    digest = hashlib.blake2b(repr((seed, shard.key, layer)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    full = torch.empty(shard.global_shape[prepended:], dtype=torch.float32)
    full.normal_(0.0, std, generator=generator)
    box = zip(shard.global_offset[prepended:], shard.data.shape, strict=True)
    return full[tuple(slice(start, start + length) for start, length in box)]
