"""Loading a checkpoint into a run with another number format or kind of optimizer.

The fp32 master weight of a parameter X has one of three names, depending on the run that saved it:

- `optimizer.state.param.X`: the distributed optimizer, in bf16 and in fp32;
- `optimizer.state.fp32_param.X`: the plain optimizer in bf16;
- `X`: the plain optimizer in fp32, where the weight itself is the master weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

_MASTER_PREFIXES = ("optimizer.state.param.", "optimizer.state.fp32_param.")


def find_aliases(wanted: Mapping[str, Any], present: Collection[str]) -> dict[str, str]:
    """Return the names under which a checkpoint holds the fp32 tensors of a run, if they differ from the run's names.

    Fp32 weights are read from the checkpoint's master weights, since the weights of a bf16 run are these, rounded.
    Example: an fp32 run with the plain optimizer wants `X`, and the checkpoint of a bf16 run has `X` in bf16 and
    `optimizer.state.param.X` in fp32; the result is `{"X": "optimizer.state.param.X"}`.

    Args:
        wanted: sharded state of a run, with its optimizer.
        present: names of the checkpoint's tensors.
    """
    aliases = {}
    for tensor in nested_values(wanted):
        if not isinstance(tensor, ShardedTensor | ShardedTensorFactory) or tensor.data.dtype != torch.float32:
            continue
        weight = tensor.key
        for prefix in _MASTER_PREFIXES:
            weight = weight.removeprefix(prefix)
        found = [name for name in (*(prefix + weight for prefix in _MASTER_PREFIXES), weight) if name in present]
        if found and found[0] != tensor.key:
            aliases[tensor.key] = found[0]
    return aliases
