"""Process groups: from the launcher's variables and `parallel` to megatron-core's parallel state."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_cpt.backend import cpu
from megatron_cpt.config import ParallelConfig
from megatron_cpt.errors import UserError

DEFAULT_TIMEOUT = 1800.0
"""Seconds that a collective may take."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.

    Attributes:
        rank, world_size: in the whole job.
        device: where this process computes.
        data_parallel_rank, data_parallel_size: among the replicas.
        tensor_rank, pipeline_rank: inside the replica.
        is_last_stage: whether this rank computes losses (the last pipeline stage).
    """

    rank: int
    world_size: int
    device: torch.device
    data_parallel_rank: int
    data_parallel_size: int
    tensor_rank: int
    pipeline_rank: int
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def launched_world_size() -> int:
    """Number of processes that the launcher started (torchrun's variables); 1 without a launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank in the launcher's job; 0 without a launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas that fit into the job.

    Raises:
        UserError: when the world size is no multiple of one replica.
    """
    replica = parallel.model_parallel_size
    if world_size % replica:
        raise UserError(
            f"parallel: one replica takes tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} = {replica} processes, but {world_size} "
            f"{'was' if world_size == 1 else 'were'} started; start a multiple of {replica} "
            f"(torchrun --nproc-per-node {replica} ...)"
        )
    return world_size // replica


@contextlib.contextmanager
def process_groups(parallel: ParallelConfig, *, timeout: float = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """Initialize torch.distributed and megatron-core's parallel state; take both down at the end.

    Without a launcher's variables the job is one process and needs no port. A process group that already exists (as in
    tests) is used and left alone.

    Args:
        parallel: how the model is split.
        timeout: seconds that a collective may take.

    Raises:
        UserError: when the world size does not fit `parallel`.
    """
    on_cpu = cpu.install()
    from megatron.core import parallel_state

    size = data_parallel_size(parallel, launched_world_size())
    own_group = not dist.is_initialized()
    if own_group:
        _initialize(on_cpu, timedelta(seconds=timeout))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=math.ceil(timeout / 60),
    )
    is_whole = False
    try:
        yield Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=cpu.CPU if on_cpu else torch.device("cuda", torch.cuda.current_device()),
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=size,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        )
        is_whole = True
    finally:
        parallel_state.destroy_model_parallel()
        if own_group and is_whole:  # after an error the others may be in the middle of a collective: NCCL would wait
            dist.destroy_process_group()


def _initialize(on_cpu: bool, timeout: timedelta) -> None:
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Checkpoints and agreements between ranks move CPU tensors also where training runs over NCCL.
    backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # in memory: one process needs no port
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
