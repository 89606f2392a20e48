"""Saving of a checkpoint: in a folder aside, on request in the background, published when every rank's part is durable.

A background save first copies the state, also during training: a forward and a backward pass change neither weights nor
moments, so only the next update waits until the copy is complete (`wait_for_copy`).

Threads copy and write, not a forked process. A fork would inherit the locks of gloo's and CUDA's threads in any state,
and the kernel would copy every page that training changes, one fault at a time. The threads make no collective calls,
and their system calls, checksums and memory copies release Python's lock.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.metadata import Metadata

from megatron_cpt.backend.collectives import on_main
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import Record
from megatron_cpt.checkpoint.saving.publish import Retention, delete, publish
from megatron_cpt.checkpoint.saving.staging import StagingBuffer
from megatron_cpt.checkpoint.saving.torch_save import AbandonedError
from megatron_cpt.checkpoint.saving.write_plan import ShardEntry, plan_shards, shard_sizes
from megatron_cpt.checkpoint.saving.writer import write_files
from megatron_cpt.checkpoint.state import state_dicts
from megatron_cpt.errors import CptError
from megatron_cpt.files.atomic import sync_folder
from megatron_cpt.optim.ema import WeightEma

Files = Mapping[str, Sequence[ShardEntry]]
"""File name -> content."""


@dataclass(frozen=True)
class _Save:
    """A save in progress.

    Attributes:
        step: the step that is saved.
        aside, final: the folder during the save, and its name once it is a checkpoint.
        metadata: description of all ranks' tensors, without their places in the files; on rank 0 only.
        files: content of this rank's files; once done, training may change the state.
        job: writing this rank's files; once `is_written`, publishing (on rank 0).
        is_written: every rank's files are durable.
    """

    step: int
    aside: Path
    final: Path
    metadata: Metadata | None
    files: Future[Files]
    job: Future[Any]
    is_written: bool = False


class Saver:
    """Saves weights, optimizer and random states of all ranks; at most one save is in progress.

    Every method except `wait_for_copy` and `close` is a collective call. A save has two jobs, each in a thread of this
    process: every rank writes its shards, then rank 0 publishes the checkpoint. `poll` starts the second job; it costs
    one all-reduce of two integers, and only while a save is in progress.

    Args:
        folder: the folder of the run's checkpoints.
        chunks, optimizer: of this rank.
        retention: which older checkpoints to keep.
        ema: moving average of the weights to save with them.
        in_background: let training continue up to its next update, which must `wait_for_copy`; otherwise `save` waits
            for the publication.
    """

    def __init__(
        self,
        folder: Path,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        retention: Retention = Retention(),  # noqa: B008 - frozen
        *,
        ema: WeightEma | None = None,
        in_background: bool = False,
    ) -> None:
        self._folder, self._retention = folder, retention
        self._chunks, self._optimizer, self._ema = chunks, optimizer, ema
        self._staging = StagingBuffer() if in_background else None
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copy")  # separate: a copy never waits for the disk
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._abandon = threading.Event()
        self._save: _Save | None = None
        self._is_validated = self._is_reserved = False

    def reserve(self) -> None:
        """Allocate and pin the memory of background saves in a thread, so that the first save does not wait for it.

        Only the first call has an effect. An update must have been applied before, since the optimizer's state does
        not exist earlier.
        """
        if self._staging is None or self._is_reserved:
            return
        self._is_reserved = True
        state = self._state()
        self._copier.submit(self._staging.reserve, shard_sizes(state))

    def save(self, step: int, record: Record) -> Path | None:
        """Save the current state under `step`; the previous save must be finished.

        Returns:
            The published checkpoint, or None if it is still being written in the background.

        Raises:
            CptError: the checkpoint's folder cannot be created, or, not in the background, as in `poll`.
        """
        assert self._save is None, "finish the previous save first"
        name = layout.checkpoint_name(step)
        aside, final = self._folder / f".{name}.tmp", self._folder / name
        self._on_main(step, partial(self._create_folder, aside))
        state = self._state()
        try:
            plan = plan_shards(state, aside, validate=not self._is_validated)
        except OSError as error:
            raise CptError(_message(step, [f"rank {dist.get_rank()}: {error}"])) from error
        self._is_validated = True  # the division into shards does not change during a run
        # Only now: megatron-core takes a folder with files for the remains of an older save, and warns.
        self._on_main(step, partial(record.write, aside))
        if self._staging is not None:
            self._is_reserved = True  # by the copy itself
            self._staging.wait_for_device()
        files = self._copier.submit(_copy, plan.files, self._staging)
        job = self._thread.submit(lambda: write_files(aside, files.result(), self._abandon))
        self._save = _Save(step, aside, final, plan.metadata, files, job)
        return None if self._staging is not None else self.finish()

    def wait_for_copy(self) -> None:
        """Wait until training may change the state; not a collective call, and free if no save is in progress."""
        if self._save is not None:
            wait([self._save.files])

    def poll(self) -> Path | None:
        """Advance a save as far as possible without waiting.

        Returns:
            The checkpoint, in the first call after its publication; otherwise None.

        Raises:
            CptError: a rank could not write; raised on all ranks. Earlier checkpoints are unchanged.
        """
        save = self._save
        if save is None:
            return None
        is_running = not save.job.done()
        has_failed = not is_running and save.job.exception() is not None
        any_running, any_failed = _any(is_running, has_failed)
        if any_failed:
            self._fail(save)
        if any_running:
            return None
        if save.is_written:
            self._save = None
            self._thread.submit(delete, save.job.result())  # nobody waits for it; the next save runs after it
            return save.final
        self._publish(save)
        return None

    def finish(self) -> Path | None:
        """Wait for the save in progress.

        Returns:
            Its checkpoint, or None if no save was in progress.

        Raises:
            CptError: as in `poll`.
        """
        path = None
        while self._save is not None:
            wait([self._save.job])
            path = self.poll()
        return path

    def close(self) -> None:
        """Abandon a save in progress and end the threads; not a collective call, so it can follow any failure."""
        self._abandon.set()
        self._copier.shutdown()
        self._thread.shutdown()
        if self._staging is not None:
            self._staging.close()

    def _state(self) -> dict[str, Any]:
        return state_dicts.training_state(self._chunks, self._optimizer, ema=self._ema, is_loading=False, with_rng=True)

    def _create_folder(self, aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        sync_folder(self._folder.parent)

    def _on_main(self, step: int, write: Callable[[], None]) -> None:
        def write_or_explain() -> None:
            try:
                write()
            except OSError as error:
                raise CptError(_message(step, [f"rank 0: {error}"])) from error

        on_main(write_or_explain)

    def _publish(self, save: _Save) -> None:
        """Start the publication on rank 0."""
        rank = dist.get_rank()
        written: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(save.job.result(), written, dst=0)
        if written is not None:
            assert save.metadata is not None
            job = self._thread.submit(publish, save.aside, save.final, save.metadata, written, self._retention)
        else:
            job = Future()
            job.set_result([])  # nothing to delete
        self._save = replace(save, job=job, is_written=True)

    def _fail(self, save: _Save) -> None:
        self._abandon.set()
        wait([save.job])
        error = save.job.exception()
        own = None if error is None or isinstance(error, AbandonedError) else f"rank {dist.get_rank()}: {error}"
        reasons: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, own)
        self._save = None
        raise CptError(_message(save.step, [reason for reason in reasons if reason])) from error


def _copy(files: Files, staging: StagingBuffer | None) -> Files:
    """Return the content with its tensors copied into the buffer; unchanged without a buffer."""
    if staging is None:
        return files
    entries = [(name, entry) for name, content in files.items() for entry in content]
    copies = iter(staging.copy([entry.data for _, entry in entries if isinstance(entry.data, torch.Tensor)]))
    copied: dict[str, list[ShardEntry]] = {name: [] for name in files}
    for name, entry in entries:
        copied[name].append(replace(entry, data=next(copies)) if isinstance(entry.data, torch.Tensor) else entry)
    return copied


def _any(*flags: bool) -> list[bool]:
    """Return for each flag whether any rank has it set; a collective call."""
    tensor = torch.tensor(flags, dtype=torch.int32)
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def _message(step: int, reasons: Sequence[str]) -> str:
    return (
        f"the checkpoint of step {step} was not written: {'; '.join(reasons)}; earlier checkpoints are unchanged; "
        "free some space or fix the disk, then start the run again"
    )
