"""The tensors of a run as megatron-core's sharded state: weights, optimizer, random states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.backend import rng_state
from megatron_cpt.checkpoint.state.fp8_history import add_histories, dequantize, take_histories
from megatron_cpt.checkpoint.state.optimizer_shards import without_gathering
from megatron_cpt.model.fp8_emulated import AMAX_HISTORY
from megatron_cpt.model.kernel_options import gather_weights

# The bucket formats of the distributed optimizer cannot change TP or PP; this one can.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def model_state(chunks: Sequence[DistributedDataParallel], *, is_loading: bool = False) -> dict[str, Any]:
    """Sharded weights of all chunks; the names inside are global, so chunks may be split differently on loading."""
    states = {}
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        states[f"model{number}"] = state = model.sharded_state_dict()
        add_histories(model, state, is_loading=is_loading)
    return states


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], *, is_loading: bool) -> Any:
    """Sharded optimizer state for the weights in `model`; its tensors are the optimizer's own."""
    with without_gathering():
        return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_SHARDING)


def training_state(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, is_loading: bool, with_rng: bool
) -> dict[str, Any]:
    """All that training goes on from: weights, optimizer and, where asked, the random states; a collective call."""
    if not is_loading:
        gather_weights(chunks)
    model = model_state(chunks, is_loading=is_loading)
    state = {**model, "optimizer": optimizer_state(optimizer, model, is_loading=is_loading)}
    for weights in model.values():  # only now: the optimizer's state is described by the parameters themselves
        dequantize(weights)
    return {**state, "rng": random_state()} if with_rng else state


def load_optimizer_state(optimizer: MegatronOptimizer, state: Any) -> None:
    """Put loaded optimizer state into the optimizer."""
    with without_gathering():
        optimizer.load_state_dict(state)


def random_state() -> dict[str, ShardedTensor]:
    """Every generator of every rank, as one long byte tensor a generator: tensors need no unpickling."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state, (0, rank, world_size))
        for name, state in rng_state().items()
    }


def amax_histories(state: dict[str, Any]) -> list[tuple[dict[str, Any], str, ShardedTensor]]:
    """The amax histories of FP8 in a sharded state: the dict that holds each, its name there, the tensor."""
    models = [value for name, value in state.items() if name.startswith("model")]
    return [(model, name, tensor) for model in models for name, tensor in model.items() if name.endswith(AMAX_HISTORY)]


def load_model_state(chunks: Sequence[DistributedDataParallel], state: dict[str, Any]) -> None:
    """Put loaded weights into the chunks."""
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        take_histories(model, state[f"model{number}"])
        # not strict: Transformer Engine's _extra_state is never loaded, and a run that takes up FP8 has no history yet
        result = model.load_state_dict(state[f"model{number}"], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith(("_extra_state", AMAX_HISTORY))]
        assert not missing, f"weights not in the checkpoint: {missing}"


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside megatron-core's wrappers, whose own load_state_dict hides what was missing."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
