"""State of the distributed optimizer as boxes of whole tensors, saved from and loaded into the optimizer's own memory.

megatron-core saves a layout-independent optimizer state (`fully_reshardable`) by gathering it: every rank of a
data-parallel group holds all of it, several times over during the copies. On loading it allocates the whole state again
and discards most of it.

That is not needed. A rank owns a range [start, end) of a parameter's elements in row-major order, and such a range is a
union of boxes: the end of a row, whole rows, the beginning of a row. Example: elements 3 to 9 of a 3 x 4 weight are the
last element of row 0, all of row 1, and the first two elements of row 2. torch's checkpoint format stores boxes and
divides them for another layout. So each rank saves its own boxes and reads them back in place, without gathering or
copying. Names and shapes in the checkpoint equal megatron-core's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

from megatron_cpt.optim.ema import WeightEma
from megatron_cpt.optim.owned_weights import OwnedWeight, is_sharded, only_part, owned_weights

_FORMAT = "fully_reshardable"  # megatron-core's other formats cannot change TP or PP
_RESHARDABLE = {"distrib_optim_sharding_type": _FORMAT}
EMA_PREFIX = "optimizer.state.ema."
"""Beginning of the name of a weight's moving average in a checkpoint."""
_SCHEDULE_KEYS = ("start_wd", "end_wd", "optimizer")  # overrides of one group, which no run of this package has

Box = tuple[int, tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, end: int) -> list[Box]:
    """Divide a range of a tensor's elements into boxes.

    Example: `boxes((3, 4), 3, 10)` is `[(0, (0, 3), (1, 1)), (1, (1, 0), (1, 4)), (5, (2, 0), (1, 2))]`.

    Args:
        shape: shape of the tensor over all ranks.
        start: first element of the range, in row-major order.
        end: one past the last element of the range.

    Returns:
        For each box the index of its first element in the range, its offsets in the tensor and its shape. Every box is
        contiguous in the tensor. There are at most 2 n - 1 boxes for n dimensions.
    """
    assert 0 <= start <= end <= math.prod(shape)
    if start == end:
        return []
    if len(shape) == 1:
        return [(0, (start,), (end - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows are [first, last)
    if first > last:  # inside one row
        return [_in_row(box, last, 0) for box in boxes(shape[1:], start - last * row, end - last * row)]
    found = []
    if start < first * row:
        found += [_in_row(box, first - 1, 0) for box in boxes(shape[1:], start - (first - 1) * row, row)]
    if first < last:
        offsets = (first, *(0 for _ in shape[1:]))
        found.append((first * row - start, offsets, (last - first, *shape[1:])))
    if last * row < end:
        found += [_in_row(box, last, last * row - start) for box in boxes(shape[1:], 0, end - last * row)]
    return found


def _in_row(box: Box, row: int, shift: int) -> Box:
    first, offsets, shape = box
    return first + shift, (row, *offsets), (1, *shape)


def sharded_state(optimizer: MegatronOptimizer, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Return the optimizer's sharded state; its tensors are the optimizer's own, not copies.

    megatron-core's plain optimizers describe their tensors in place; for the distributed optimizer this module does.

    Args:
        optimizer: of the run.
        model: sharded weights of all chunks, which name and place the optimizer's tensors.
        is_loading: the state is about to be loaded, so the optimizer must have its tensors.
    """
    part = only_part(optimizer)
    if not is_loading:
        _create_missing_moments(part.optimizer)
    if not isinstance(part, DistributedOptimizer):
        plain: dict[str, Any] = part.sharded_state_dict(model, is_loading=is_loading, metadata=_RESHARDABLE)
        return plain
    state: dict[str, Any] = part.state_dict()  # the parameter groups
    if is_loading:
        part.load_state_dict(part.state_dict())  # allocates moments before the first step
    return {**state, "param_state": _own_boxes(part, model), "param_state_sharding_type": _FORMAT}


def _create_missing_moments(adam: torch.optim.Optimizer) -> None:
    """Create the moments of a run that has not applied an update yet, because every step so far was skipped."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                dtype = getattr(adam, "moments", torch.float32)  # FusedAdam's are fp32
                zeros = {name: torch.zeros_like(parameter, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter].update(zeros)


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put the loaded `sharded_state`, changed in place, into the optimizer, whichever kind of optimizer saved it."""
    part = only_part(optimizer)
    # megatron-core's plain fp32 optimizer has its parameter groups at the top, the others have them under `optimizer`.
    inner = state.setdefault("optimizer", {})
    own, other = (state, inner) if isinstance(part, FP32Optimizer) else (inner, state)
    if "param_groups" in other:
        saved = other.pop("param_groups")
        parameters = own.get("param_groups", [{}] * len(saved))
        own["param_groups"] = [{**group, **numbers} for group, numbers in zip(saved, parameters, strict=True)]
    _set_rates(own["param_groups"], part.config)
    if isinstance(part, DistributedOptimizer):
        state.pop("param_state", None)  # its tensors are the optimizer's own and are filled already
    part.load_state_dict(state)


def _set_rates(groups: list[dict[str, Any]], config: Any) -> None:
    """Give saved parameter groups the run's own rates, because megatron-core 0.19 finds a group by them.

    Without this a checkpoint could not be loaded under another schedule.
    """
    for group in groups:
        for name in _SCHEDULE_KEYS:
            group.pop(name, None)
        group.update(max_lr=config.lr, min_lr=config.min_lr)


def ema_state(ema: WeightEma, optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[int, Any]:
    """Return the sharded moving average of the weights; its tensors are the average's own memory, not copies.

    Args:
        ema: of this rank.
        optimizer: whose weights are averaged.
        model: as in `sharded_state`.
    """
    parameters, own_share = _described(model), is_sharded(optimizer)
    return {
        number: _numbered(_describe(parameters[id(owned.parameter)], owned, "ema", average, own_share=own_share))
        for number, (owned, average) in enumerate(ema.entries())
    }


def _own_boxes(optimizer: Any, model: dict[str, Any]) -> dict[int, Any]:
    """Describe the master weights and moments that this rank owns."""
    parameters = _described(model)
    state: dict[int, Any] = {}
    for number, owned in enumerate(owned_weights(optimizer)):
        tensors = optimizer._get_main_param_and_optimizer_states(owned.parameter)
        state[number] = {
            name: _numbered(_describe(parameters[id(owned.parameter)], owned, name, tensor, own_share=True))
            for name, tensor in tensors.items()
            if name != "step"  # one per parameter group, saved with the groups
        }
    return state


def _described(model: dict[str, Any]) -> Mapping[int, ShardedTensor | ShardedTensorFactory]:
    """Return the description of each parameter by its `id`."""
    entries = [entry for entry in nested_values(model) if isinstance(entry, ShardedTensor | ShardedTensorFactory)]
    return {id(entry.data): entry for entry in entries}


def _numbered(boxes: Iterator[ShardedTensor]) -> dict[str, ShardedTensor]:
    return {str(number): box for number, box in enumerate(boxes)}


def _describe(
    described: ShardedTensor | ShardedTensorFactory,
    owned: OwnedWeight,
    name: str,
    tensor: torch.Tensor,
    *,
    own_share: bool,
) -> Iterator[ShardedTensor]:
    """Yield a range of optimizer state as boxes of the parameter's whole tensor.

    Args:
        described: the parameter.
        owned: the range.
        name: kind of the state.
        tensor: its values in the range.
        own_share: data-parallel replicas own different ranges; otherwise each has the whole parameter.
    """
    parameter, start, end = owned.parameter, owned.start, owned.end
    flat = tensor.detach().view(-1)
    assert flat.numel() == end - start
    # A factory describes a parameter that holds several parts: the two halves of a gated fc1.
    parts = described.build() if isinstance(described, ShardedTensorFactory) else [described]
    for part in nested_values(parts) if isinstance(parts, dict) else parts:
        assert part.data.is_contiguous(), f"{part.key}: not a row-major part of its parameter"
        # An FP8 weight has no data pointer of its own, but it is never one of several parts.
        is_whole = part.data is parameter
        begin = 0 if is_whole else (part.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        low, high = max(start, begin), min(end, begin + part.data.numel())
        if low >= high:
            continue
        for first, offsets, shape in boxes(part.local_shape, low - begin, high - begin):
            position = low - start + first
            leading = (1,) * part.prepend_axis_num
            whole = (*part.global_offset[: part.prepend_axis_num],)
            within = zip(part.global_offset[part.prepend_axis_num :], offsets, strict=True)
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{part.key}",
                data=flat[position : position + math.prod(shape)].view(*leading, *shape),
                dtype=flat.dtype,
                local_shape=(*leading, *shape),
                global_shape=tuple(part.global_shape),
                global_offset=(*whole, *(a + b for a, b in within)),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*part.replica_id[:2], 0) if own_share else part.replica_id,  # (pipeline, tensor, data)
                allow_shape_mismatch=part.allow_shape_mismatch,
            )
