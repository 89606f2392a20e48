"""The tensors of a run as megatron-core's sharded state: weights, optimizer, random states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.backend import rng_state

# The bucket formats of the distributed optimizer cannot change TP or PP; this one can.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def model_state(chunks: Sequence[DistributedDataParallel]) -> dict[str, Any]:
    """Sharded weights of all chunks; the names inside are global, so chunks may be split differently on loading."""
    return {f"model{number}": unwrap(chunk).sharded_state_dict() for number, chunk in enumerate(chunks)}


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], *, is_loading: bool) -> Any:
    """Sharded optimizer state for the weights in `model`."""
    return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_SHARDING)


def random_state() -> dict[str, ShardedTensor]:
    """Every generator of every rank, as one long byte tensor a generator: tensors need no unpickling."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state, (0, rank, world_size))
        for name, state in rng_state().items()
    }


def load_model_state(chunks: Sequence[DistributedDataParallel], state: dict[str, Any]) -> None:
    """Put loaded weights into the chunks."""
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        # not strict: Transformer Engine's _extra_state is not part of a checkpoint from the local spec
        result = model.load_state_dict(state[f"model{number}"], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
        assert not missing, f"weights not in the checkpoint: {missing}"


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside megatron-core's wrappers, whose own load_state_dict hides what was missing."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
