"""Division of a sharded state into the files that each rank writes, by the planners of torch and megatron-core."""

from __future__ import annotations

import errno
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem

_TORCH_WRITE_ERRORS = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")
NUM_FILES = 2  # per rank, written at the same time by one thread each


@dataclass(frozen=True)
class ShardEntry:
    """Part of a shard: its description in torch's plan, and a box of a tensor or an object already serialized."""

    item: WriteItem
    data: torch.Tensor | io.BytesIO

    @property
    def num_bytes(self) -> int:
        """Size of the content."""
        return self.data.nbytes if isinstance(self.data, torch.Tensor) else self.data.getbuffer().nbytes


@dataclass(frozen=True)
class ShardPlan:
    """Files that one rank writes.

    Attributes:
        files: file name -> content, in the order of writing.
        metadata: description of all ranks' tensors, without their places in the files; on rank 0 only.
    """

    files: dict[str, list[ShardEntry]]
    metadata: Metadata | None


def plan_shards(state: dict[str, Any], folder: Path, *, validate: bool) -> ShardPlan:
    """Plan the writing of a sharded state; a collective call.

    As a side effect megatron-core writes metadata.json and, up to version 0.18, common.pt (the optimizer's parameter
    groups and other values that are not sharded) into `folder`.

    `validate` checks that the ranks' shards cover every tensor exactly once.

    Raises:
        OSError: one of the two files could not be written.
    """
    planner = _PlanOnly("torch_dist", 1)
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=planner, validate_access_integrity=validate)
    except RuntimeError as error:
        if not any(text in str(error) for text in _TORCH_WRITE_ERRORS):
            raise
        raise OSError(errno.EIO, f"cannot be written ({error})", str(folder / "common.pt")) from error
    assert planner.plan is not None
    return planner.plan


def shard_sizes(state: dict[str, Any]) -> list[int]:
    """Return the bytes of each tensor that `plan_shards` divides over this rank's files; changes `state`."""
    apply_factories(state)
    tensors = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
    return [tensor.data.nbytes for tensor in tensors if is_main_replica(tensor.replica_id)]


class _PlanOnly(torch_strategy.TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's strategy for torch's format, which stops before writing."""

    plan: ShardPlan | None = None

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        entries, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        state = torch_strategy.mcore_to_pyt_state_dict(entries)
        planner = torch_strategy.MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        rank = dist.get_rank()
        planner.set_up_planner(state, is_coordinator=rank == 0)
        own = planner.create_local_plan()
        plans: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(own, plans, dst=0)
        metadata = planner.create_global_plan(plans)[1] if plans is not None else None
        content = [ShardEntry(item, _resolved(planner, item)) for item in own.items]
        self.plan = ShardPlan(_divided(content, rank), metadata)


def _resolved(planner: Any, item: WriteItem) -> torch.Tensor | io.BytesIO:
    data = planner.resolve_data(item)
    return data.detach() if isinstance(data, torch.Tensor) else data


def _divided(entries: list[ShardEntry], rank: int) -> dict[str, list[ShardEntry]]:
    """Distribute the entries over files of about the same size, the largest entries first."""
    files: list[list[ShardEntry]] = [[] for _ in range(NUM_FILES)]
    sizes = [0] * NUM_FILES
    for entry in sorted(entries, key=lambda entry: entry.num_bytes, reverse=True):
        smallest = sizes.index(min(sizes))
        files[smallest].append(entry)
        sizes[smallest] += entry.num_bytes
    return {f"__{rank}_{number}.distcp": content for number, content in enumerate(files) if content}
