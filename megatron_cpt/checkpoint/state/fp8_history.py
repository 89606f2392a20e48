"""Scaling factors and histories of delayed FP8 scaling in Transformer Engine, saved as plain tensors.

Transformer Engine keeps them in `_extra_state`, a pickle inside a byte tensor. Unpickling it could execute code from a
checkpoint. From version 2.20 on Transformer Engine skips it unless an environment variable is set; the run then resumes
without scaling factors, which gives NaN (NVIDIA-NeMo/Megatron-Bridge issue 1730).

Here each layer has two more tensors instead, `fp8_forward.amax_history` and `fp8_backward.amax_history`. The first row
has the scaling factors, the other rows have the history of largest magnitudes. Example: a linear layer with 3 forward
tensors and a history of 1024 steps has an `fp8_forward.amax_history` of shape (1025, 3). `_extra_state` is written
empty, for Megatron-LM, and never read.

The history is reduced over all ranks that hold a part or a copy of a layer. So it is stored once and fits any layout.
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
    """Return whether a module is a layer of Transformer Engine that may have scaling factors."""
    return hasattr(module, "fp8_meta") and hasattr(module, "init_fp8_meta_tensors")


def add_histories(model: torch.nn.Module, state: dict[str, Any], *, is_loading: bool) -> None:
    """Add the histories to a sharded state and empty Transformer Engine's pickles.

    Args:
        model: a GPTModel.
        state: its sharded state; changed in place.
        is_loading: the state describes what to load: remove the pickles, and give a history to layers without one.
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
    """Create the tensors of delayed scaling, as Transformer Engine does in the first forward pass."""
    if model.config.fp8 is None or model.config.fp8_recipe != "delayed" or "scaling_fwd" in layer.fp8_meta:
        return
    recipe = get_fp8_recipe(model.config)
    layer.fp8_meta.update(recipe=recipe, num_gemms=1)  # every layer of a dense model is one matrix product
    layer.init_fp8_meta_tensors(recipe)


def _sharded(entry: ShardedObject, part: str, content: torch.Tensor) -> ShardedTensor:
    """Return a tensor that is complete on every rank of its layer, at the position of the layer's pickle."""
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
    """Move loaded histories from the state into the layers."""
    for key, part in _DIRECTIONS.items():
        for name in [name for name in state if name.endswith(f".{part}")]:
            content = state.pop(name)
            layer: Any = model.get_submodule(name.removesuffix(f".{part}"))
            scaling = layer.fp8_meta[key]
            scaling.scale.copy_(content[0])
            scaling.amax_history.copy_(content[1:])


def dequantize(state: dict[str, Any]) -> None:
    """Convert FP8 weights to the run's own dtype, so that any run can read the checkpoint."""
    for entry in state.values():
        if isinstance(entry, ShardedTensor) and is_float8tensor(entry.data):
            entry.data = dequantize_fp8_tensor(entry.data)
