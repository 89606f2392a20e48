"""A checkpoint of one number format or kind of optimizer, read by a run with another.

The weights in full precision have three names: `optimizer.state.param.X` where the distributed optimizer saved, in fp32
as well; `optimizer.state.fp32_param.X` where the plain one saved in bf16; and just `X` where that saved in fp32. A run
finds them under the name that it would have given them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

_MASTERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")


def other_names(wanted: Mapping[str, Any], present: Collection[str]) -> dict[str, str]:
    """Where a checkpoint has the full precision that a run wants.

    Args:
        wanted: a run's sharded state with its optimizer.
        present: names of the checkpoint's tensors.

    Returns:
        For each name that the run asks for the one that holds its content, where that is another one. Weights in fp32
        are master weights as well: what a bf16 run computed with is these, rounded.
    """
    names = {}
    for tensor in nested_values(wanted):
        if not isinstance(tensor, ShardedTensor | ShardedTensorFactory) or tensor.data.dtype != torch.float32:
            continue
        weight = tensor.key
        for prefix in _MASTERS:
            weight = weight.removeprefix(prefix)
        found = [name for name in (*(prefix + weight for prefix in _MASTERS), weight) if name in present]
        if found and found[0] != tensor.key:
            names[tensor.key] = found[0]
    return names


@contextlib.contextmanager
def reading_as(names: Mapping[str, str]) -> Iterator[None]:
    """Inside the block, a checkpoint has the content of one tensor under the name of another as well.

    Args:
        names: name to read -> name in the checkpoint.
    """
    read_metadata = FileSystemReader.read_metadata
    readers: dict[str, list[str]] = {}
    for name, content in names.items():
        readers.setdefault(content, []).append(name)

    def read_and_name(reader: Any, *args: Any, **options: Any) -> Metadata:
        stored = read_metadata(reader, *args, **options)
        named = copy.copy(stored)  # not changed where it lies: megatron-core keeps it for the next reader
        named.state_dict_metadata = {
            **stored.state_dict_metadata,
            **{name: stored.state_dict_metadata[content] for name, content in names.items()},
        }
        named.storage_data = dict(stored.storage_data)
        for index, place in stored.storage_data.items():
            for name in readers.get(index.fqn, ()):
                named.storage_data[dataclasses.replace(index, fqn=name)] = place
        return named

    FileSystemReader.read_metadata = read_and_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]


def nest_groups(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put the parameter groups of a loaded state where this kind of optimizer looks for them.

    megatron-core's plain fp32 optimizer has them at the top, the others under `optimizer`.
    """
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = state.setdefault("optimizer", {})
    own, other = (state, inner) if isinstance(part, FP32Optimizer) else (inner, state)
    if "param_groups" in other:
        saved = other.pop("param_groups")
        parameters = own.get("param_groups", [{}] * len(saved))
        own["param_groups"] = [{**group, **numbers} for group, numbers in zip(saved, parameters, strict=True)]
    state.setdefault("param_state_sharding_type", "fully_reshardable")
