"""What Transformer Engine knows beside weights, as plain tensors: the scaling factors of delayed FP8 scaling.

Transformer Engine keeps them in `_extra_state`, a pickle inside a byte tensor, and unpickles what a checkpoint brings,
so that a checkpoint could run code; from 2.20 on it refuses to, unless an environment variable allows it, and then
a run goes on without its scaling factors (NVIDIA-NeMo/Megatron-Bridge issue 1730 shows NaN). Here each layer has two
tensors more, `fp8_forward.amax_history` and `fp8_backward.amax_history`: the scaling factors in the first row, the
history of largest magnitudes below. `_extra_state` is written empty, for Megatron-LM, and never read.

All ranks that hold a part of a layer, or a copy of it, have the same history (it is reduced over them), so it is stored
once and serves any layout.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.fp8_utils import dequantize_fp8_tensor, get_fp8_recipe, is_float8tensor

from megatron_cpt.model.fp8_emulated import AMAX_HISTORY

EXTRA_STATE = "_extra_state"
_DIRECTIONS = {"scaling_fwd": f"fp8_forward.{AMAX_HISTORY}", "scaling_bwd": f"fp8_backward.{AMAX_HISTORY}"}


def is_te_layer(module: Any) -> bool:
    """Whether a module is one of Transformer Engine's that may have scaling factors."""
    return hasattr(module, "fp8_meta") and hasattr(module, "init_fp8_meta_tensors")


def add_histories(model: torch.nn.Module, state: dict[str, Any], *, is_loading: bool) -> None:
    """Put the histories into a sharded state, in the place of Transformer Engine's pickles.

    Args:
        model: a GPTModel.
        state: its sharded state; changed in place.
        is_loading: whether the state says what to load; layers that have not computed yet get histories for it.
    """
    for name in [name for name in state if name.endswith(EXTRA_STATE)]:
        layer: Any = model.get_submodule(name.removesuffix(f".{EXTRA_STATE}"))
        entry = state[name]
        if not is_te_layer(layer) or not isinstance(entry, ShardedObject):
            continue
        if is_loading:
            del state[name]
            _prepare(layer, model)
        else:
            entry.data = torch.empty(0, dtype=torch.uint8)
        for key, part in _DIRECTIONS.items():
            scaling = layer.fp8_meta.get(key)
            if hasattr(scaling, AMAX_HISTORY):
                content = torch.cat([scaling.scale[None], scaling.amax_history]).cpu()
                state[name.removesuffix(EXTRA_STATE) + part] = _sharded(entry, part, content)


def _prepare(layer: Any, model: Any) -> None:
    """Make the tensors of delayed scaling, which Transformer Engine makes in the first forward pass."""
    if model.config.fp8 is None or model.config.fp8_recipe != "delayed" or "scaling_fwd" in layer.fp8_meta:
        return
    recipe = get_fp8_recipe(model.config)
    layer.fp8_meta.update(recipe=recipe, num_gemms=1)  # all layers of a dense model are one matrix product each
    layer.init_fp8_meta_tensors(recipe)


def _sharded(entry: ShardedObject, part: str, content: torch.Tensor) -> ShardedTensor:
    """A tensor that is whole on every rank of its layer, at the place where the layer's pickle would be."""
    places = zip(entry.global_offset, entry.global_shape, strict=True)
    layers = [(axis, place, size) for axis, (place, size) in enumerate(places)]
    return ShardedTensor.from_rank_offsets(
        entry.key.removesuffix(EXTRA_STATE) + part,
        content,
        *layers,
        replica_id=entry.replica_id,
        prepend_axis_num=len(layers),
    )


@torch.no_grad()
def take_histories(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Give the layers what was loaded, and take it out of the state."""
    for key, part in _DIRECTIONS.items():
        for name in [name for name in state if name.endswith(f".{part}")]:
            content = state.pop(name)
            layer: Any = model.get_submodule(name.removesuffix(f".{part}"))
            scaling = layer.fp8_meta[key]
            scaling.scale.copy_(content[0])
            scaling.amax_history.copy_(content[1:])


def dequantize(state: dict[str, Any]) -> None:
    """Weights that are kept in FP8, in the run's own type: what a checkpoint holds, whoever reads it."""
    for entry in state.values():
        if isinstance(entry, ShardedTensor) and is_float8tensor(entry.data):
            entry.data = dequantize_fp8_tensor(entry.data)
