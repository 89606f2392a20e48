"""Tensors of a run in megatron-core's sharded form: weights, optimizer, random states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.backend import rng_state
from megatron_cpt.checkpoint.state import optimizer_shards
from megatron_cpt.checkpoint.state.fp8_history import add_histories, dequantize, take_histories
from megatron_cpt.model.fp8_emulated import AMAX_HISTORY
from megatron_cpt.model.kernel_options import gather_weights
from megatron_cpt.optim.ema import WeightEma


def model_state(chunks: Sequence[DistributedDataParallel], *, is_loading: bool = False) -> dict[str, Any]:
    """Return the sharded weights of all chunks; their names are global, so a load may divide the layers differently."""
    states = {}
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        states[f"model{number}"] = state = model.sharded_state_dict()
        add_histories(model, state, is_loading=is_loading)
    return states


def training_state(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    ema: WeightEma | None = None,
    is_loading: bool,
    with_rng: bool,
) -> dict[str, Any]:
    """Return the state that training resumes from: weights, optimizer and, if asked, random states; a collective.

    Args:
        chunks, optimizer: of this rank.
        ema: moving average of the weights; None: none is saved or loaded.
        is_loading: as in `optimizer_shards.sharded_state`.
        with_rng: with random states.
    """
    if not is_loading:
        gather_weights(chunks)
    model = model_state(chunks, is_loading=is_loading)
    state = {**model, "optimizer": optimizer_shards.sharded_state(optimizer, model, is_loading=is_loading)}
    if ema is not None:
        state["ema"] = optimizer_shards.ema_state(ema, optimizer, model)
    for weights in model.values():  # last: the parameters themselves identify the optimizer's tensors
        dequantize(weights)
    return {**state, "rng": random_state()} if with_rng else state


def random_state() -> dict[str, ShardedTensor]:
    """Return one byte tensor per generator, over all ranks: unlike pickles, tensors are safe to load."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state, (0, rank, world_size))
        for name, state in rng_state().items()
    }


def amax_histories(state: dict[str, Any]) -> list[tuple[dict[str, Any], str, ShardedTensor]]:
    """Return the FP8 amax histories in a sharded state: the dict that holds each one, its key there, the tensor."""
    models = [value for name, value in state.items() if name.startswith("model")]
    return [(model, name, tensor) for model in models for name, tensor in model.items() if name.endswith(AMAX_HISTORY)]


def load_model_state(chunks: Sequence[DistributedDataParallel], state: dict[str, Any]) -> None:
    """Copy loaded weights into the chunks."""
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        take_histories(model, state[f"model{number}"])
        # not strict: _extra_state is never loaded, and a run that switches to FP8 has no amax history yet
        result = model.load_state_dict(state[f"model{number}"], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith(("_extra_state", AMAX_HISTORY))]
        assert not missing, f"weights not in the checkpoint: {missing}"


def unwrap(chunk: Any) -> Any:
    """Return the GPTModel inside megatron-core's wrappers, whose load_state_dict does not report missing weights."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
