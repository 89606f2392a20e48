"""The distributed optimizer's state as pieces of whole tensors, saved and loaded where it lies.

megatron-core writes a layout-independent optimizer state (`fully_reshardable`) by gathering it: every rank of a
data-parallel group ends up with all of it, several times over while it is copied together, and on loading it allocates
the whole again and throws most of it away. But what a rank owns of a parameter, a range [start, end) of its elements in
row-major order, is a union of at most three boxes: the end of a row, whole rows, the beginning of a row. Boxes are what
`torch.distributed.checkpoint` stores and cuts anew for another layout. So each rank writes its own boxes out of the
optimizer's tensors and reads them back into those tensors: no gathering, no copies, and the names and shapes in the
checkpoint are megatron-core's.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Box = tuple[int, tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, end: int) -> list[Box]:
    """Divide a range of a tensor's elements into boxes.

    Args:
        shape: of the whole tensor.
        start: first element of the range in row-major order.
        end: one past its last.

    Returns:
        For each box the number of its first element in the range, its offsets in the tensor and its shape; every box
        is contiguous in the tensor. At most 2 n - 1 of them for n dimensions.
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


@contextlib.contextmanager
def without_gathering() -> Iterator[None]:
    """Inside the block, megatron-core's `fully_reshardable` format is written and read in place."""
    replaced = {
        "sharded_param_state_fully_reshardable": _own_state,
        "load_parameter_state_from_fully_reshardable": _is_loaded,
    }
    earlier = {name: getattr(DistributedOptimizer, name) for name in replaced}
    garbage_collector = distrib_optimizer.gc
    for name, function in replaced.items():
        setattr(DistributedOptimizer, name, function)
    # It cleans up after the gathering, and takes longer (0.2 s) than all the rest of it does for a GiB of state.
    distrib_optimizer.gc = types.SimpleNamespace(collect=lambda: 0)
    try:
        yield
    finally:
        distrib_optimizer.gc = garbage_collector
        for name, function in earlier.items():
            setattr(DistributedOptimizer, name, function)


def _own_state(
    optimizer: Any, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> dict[int, Any]:
    """This rank's part of master weights and moments; its tensors are the optimizer's own."""
    described = {
        id(sharded.data): sharded
        for sharded in nested_values(model_sharded_state_dict)
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory)
    }
    state: dict[int, Any] = {}
    for parameter, (start, end) in _ranges(optimizer):
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        assert {"param", "exp_avg", "exp_avg_sq"} <= set(tensors), "the optimizer has no state yet"
        state[len(state)] = {
            name: {
                str(number): piece
                for number, piece in enumerate(_pieces(described[id(parameter)], parameter, name, tensor, start, end))
            }
            for name, tensor in tensors.items()
            if name != "step"  # one a parameter group, kept with the groups
        }
    return state


def _is_loaded(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Nothing is left to do: what was asked for were views of the optimizer's tensors."""


def _ranges(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, tuple[int, int]]]:
    """The parameters that this rank updates, each with the range of its elements."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, (ranges["param"].start, ranges["param"].end)


def _pieces(
    described: ShardedTensor | ShardedTensorFactory,
    parameter: torch.nn.Parameter,
    name: str,
    tensor: torch.Tensor,
    start: int,
    end: int,
) -> Iterator[ShardedTensor]:
    """A flat piece of optimizer state as boxes of the parameter's whole tensor."""
    flat = tensor.detach().view(-1)
    assert flat.numel() == end - start
    # A factory stands for a parameter that is several parts of the whole: the two halves of a gated fc1.
    parts = described.build() if isinstance(described, ShardedTensorFactory) else [described]
    for part in nested_values(parts) if isinstance(parts, dict) else parts:
        assert part.data.is_contiguous(), f"{part.key}: not a row-major part of its parameter"
        # A weight in FP8 has no data pointer of its own; it is never one of several parts.
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
                replica_id=(*part.replica_id[:2], 0),  # (pipeline, tensor, data): each replica owns another range
                allow_shape_mismatch=part.allow_shape_mismatch,
            )
