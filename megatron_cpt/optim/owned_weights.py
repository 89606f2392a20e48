"""Weights that a rank updates: a parameter of the model, or a range of its elements, with the fp32 master weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


@dataclass(frozen=True)
class OwnedWeight:
    """Range of a parameter's elements that this rank updates.

    Attributes:
        parameter: of the model, in the compute format.
        start, end: the range, in row-major order: a share with the distributed optimizer, else the whole parameter.
        master: fp32 weights of the range, which the optimizer updates. In an fp32 run they are memory of `parameter`.
    """

    parameter: torch.Tensor
    start: int
    end: int
    master: torch.Tensor

    def elements(self) -> torch.Tensor:
        """Return the range of the parameter, (end - start,), in the parameter's own memory."""
        return self.parameter.detach().view(-1)[self.start : self.end]


def only_part(optimizer: Any) -> Any:
    """Return the one optimizer in megatron-core's chain; dense models have no second one."""
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return part


def is_sharded(optimizer: Any) -> bool:
    """Return whether the optimizer is divided among the data-parallel ranks."""
    return isinstance(only_part(optimizer), DistributedOptimizer)


def owned_weights(optimizer: Any) -> list[OwnedWeight]:
    """Return the weights that this rank updates, whichever of megatron-core's optimizers it has."""
    part = only_part(optimizer)
    if isinstance(part, DistributedOptimizer):
        return [
            OwnedWeight(parameter, start, end, _master(part, parameter)) for parameter, (start, end) in _ranges(part)
        ]
    return [OwnedWeight(parameter, 0, parameter.numel(), master) for parameter, master in _whole(part)]


def _ranges(part: Any) -> Iterator[tuple[torch.nn.Parameter, tuple[int, int]]]:
    """Yield the parameters that this rank updates a part of, each with the range of elements that it owns."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, (ranges["param"].start, ranges["param"].end)


def _master(part: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return this rank's share of the master weights.

    megatron-core's `_get_main_param_and_optimizer_states` would create an empty state of Adam before the first step.
    `load_state_dict` then takes the moments for allocated, and they are not loaded.
    """
    group, place = part.model_param_group_index_map[parameter]
    master: torch.Tensor = part.optimizer.param_groups[group]["params"][place]
    return master


def _whole(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each parameter with its master weights; an fp32 parameter is its own."""
    rounded: dict[int, torch.Tensor] = {}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for parameters, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            rounded |= {id(master): parameter for parameter, master in zip(parameters, masters, strict=True)}
    for master in part.get_parameters():
        yield rounded.get(id(master), master), master
