"""Process groups of torch.distributed and megatron-core, built from the launcher's variables and `parallel`."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpt.backend import cpu
from megatron_cpt.config import ParallelConfig, format_number_of
from megatron_cpt.config.launcher import read_launcher
from megatron_cpt.errors import UserError

_MINUTES = 20 * 24 * 60  # for collectives of a second layout: the watchdog ends what hangs, see `train/trainer.py`


@dataclass(frozen=True)
class Ranks:
    """Position of this process in the job.

    Attributes:
        rank, world_size: over all processes.
        device: device of this process.
        data_parallel_rank, data_parallel_size: index of this process's replica, and number of replicas.
        tensor_rank, pipeline_rank: position inside the replica.
        is_last_stage: True on the last pipeline stage, which computes the loss.
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
        """True on the rank that writes logs and files of the run."""
        return self.rank == 0


def launched_world_size() -> int:
    """Return the number of processes of the job; 1 without a launcher.

    Raises:
        UserError: the launcher's variables are incomplete or contradict each other.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return read_launcher().world_size


def launched_rank() -> int:
    """Return the rank of this process in the job; 0 without a launcher.

    Raises:
        UserError: the launcher's variables are incomplete or contradict each other.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return read_launcher().rank


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of replicas of the model in the job.

    Raises:
        UserError: the world size is not a multiple of the size of a replica.
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
def process_groups(parallel: ParallelConfig, *, timeout: float = 1800.0) -> Iterator[Ranks]:
    """Initialize torch.distributed and megatron-core's parallel state; destroy both on exit.

    Without a launcher the job is one process and needs no port. An existing process group, as in tests, is used and
    kept.

    Args:
        parallel: section of run.yaml.
        timeout: of a collective, in seconds.

    Raises:
        UserError: the world size does not fit `parallel`, or Transformer Engine does not load.
    """
    on_cpu = cpu.install()
    parallel_state = _parallel_state()
    size = data_parallel_size(parallel, launched_world_size())
    with job_group(timeout=timeout) as before_end:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=math.ceil(timeout / 60),
        )
        before_end.callback(parallel_state.destroy_model_parallel)
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


def second_layout(parallel: ParallelConfig) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Create the process groups of another layout of the same ranks; a collective call of all ranks.

    megatron-core has one global parallel state. Its layers keep their groups, but build and forward pass also ask the
    state, so both take place inside the context.

    Returns:
        A function that returns a context in which megatron-core sees the other layout.
    """
    parallel_state = _parallel_state()

    def state() -> dict[str, Any]:
        return {name: value for name, value in vars(parallel_state).items() if name[0] == "_" and name.isupper()}

    @contextlib.contextmanager
    def replaced(other: dict[str, Any]) -> Iterator[None]:
        own = state()
        vars(parallel_state).update(other)
        try:
            yield
        finally:
            vars(parallel_state).update(own)

    with replaced({name: {} if isinstance(value, dict) else None for name, value in state().items()}):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            distributed_timeout_minutes=_MINUTES,
        )
        second = state()
    return lambda: replaced(second)


@contextlib.contextmanager
def job_group(*, timeout: float) -> Iterator[contextlib.ExitStack]:
    """Initialize torch.distributed alone, for collective calls before the layout is known; destroy it on exit.

    An existing process group is used and kept.

    Args:
        timeout: of a collective over all ranks, in seconds.

    Yields:
        Stack of callbacks for the end: after an error has aborted the communicators, before the group is destroyed.
    """
    on_cpu = cpu.install()
    own_group = not dist.is_initialized()
    if own_group:
        _initialize(on_cpu, timedelta(seconds=timeout))
    before_end, has_finished = contextlib.ExitStack(), False
    try:
        yield before_end
        has_finished = True
    finally:
        if own_group and not on_cpu and not has_finished:
            _abort()
        before_end.close()
        if own_group:
            _destroy(has_finished)


def _destroy(has_finished: bool) -> None:
    # After an error, other ranks may be inside a collective, for which gloo would wait.
    if dist.is_initialized() and (has_finished or dist.get_world_size() == 1):
        dist.destroy_process_group()


def _parallel_state() -> Any:
    """Import megatron-core, which imports Transformer Engine and accepts no failure of it but ImportError."""
    try:
        from megatron.core import parallel_state
    except OSError as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Transformer Engine is installed, but does not load: {first_line}; install a release that was built for "
            f"torch {torch.__version__}, or uninstall transformer-engine to train with the layers of torch"
        ) from error
    return parallel_state


def _abort() -> None:
    """Abort all communicators after an error; otherwise their destructors wait for kernels that wait for other ranks.

    torch offers this as an experiment only. If it fails, the error that led here still counts.
    """
    with contextlib.suppress(RuntimeError, AttributeError):
        dist.distributed_c10d._abort_process_group()


def _initialize(on_cpu: bool, timeout: timedelta) -> None:
    launched, device = read_launcher(), None
    if not on_cpu:
        if launched.local_rank >= torch.cuda.device_count():
            seen = format_number_of(torch.cuda.device_count(), "GPU")
            raise UserError(
                f"environment: LOCAL_RANK={launched.local_rank}, but this process sees {seen}; "
                "start at most one rank per GPU, and let every rank see all GPUs of its node (CUDA_VISIBLE_DEVICES; "
                "SLURM's --gpus-per-task hides the others)"
            )
        device = torch.device("cuda", launched.local_rank)
        torch.cuda.set_device(device)
    # Training uses NCCL on GPUs; saving checkpoints and checking files move CPU tensors, over gloo. With its device
    # NCCL connects at once, and groups are split from the first one instead of meeting through the store.
    backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
    if launched.has_launcher:
        try:
            dist.init_process_group(backend, timeout=timeout, device_id=device)
        except dist.DistNetworkError as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = "the port is in use" if "EADDRINUSE" in str(error) else "nothing answers there"
            raise UserError(
                f"environment: MASTER_ADDR:MASTER_PORT = {address}: {reason}; start the ranks with "
                "`megatron-cpt launch`, which chooses a free port"
            ) from error
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # in memory, so no port is opened
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=device)
