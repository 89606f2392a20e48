"""Writing a checkpoint: aside, in the background where asked, published once every rank's part is durable.

In the background the state is first copied, and that too beside training: a forward and a backward pass change neither
weights nor moments, so it is the next update that waits until the copy is whole (`wait_for_copy`).

Threads copy and write, not a forked process: a fork copies the locks of gloo's and CUDA's threads in whatever state
they are, and pages that training then changes are copied by the kernel one fault at a time. The threads hold no
collective and spend their time in system calls, checksums and copies of memory, which leave Python's lock to training.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.metadata import Metadata

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.record import Record
from megatron_cpt.checkpoint.saving.publish import Retention, delete, publish
from megatron_cpt.checkpoint.saving.staging import StagingBuffer
from megatron_cpt.checkpoint.saving.torch_save import AbandonedError
from megatron_cpt.checkpoint.saving.write_plan import ShardEntry, plan_shards
from megatron_cpt.checkpoint.saving.writer import write_files
from megatron_cpt.checkpoint.state import state_dicts
from megatron_cpt.errors import CptError
from megatron_cpt.files.atomic import sync_folder

Files = Mapping[str, Sequence[ShardEntry]]
"""Name -> content."""


@dataclass(frozen=True)
class _Save:
    """A save under way.

    Attributes:
        step: of which step.
        aside, final: the folder that is written, and its name once it is a checkpoint.
        metadata: of all ranks' tensors, without their places; on rank 0 only.
        files: what this rank writes; when that is there, training may change the state.
        job: the writing, and after that, on rank 0, the publication.
        is_written: whether every rank's part is durable, and `job` the publication.
    """

    step: int
    aside: Path
    final: Path
    metadata: Metadata | None
    files: Future[Files]
    job: Future[Any]
    is_written: bool = False


class Saver:
    """Saves weights, optimizer and random states of all ranks; at most one save is under way.

    Every method but `wait_for_copy` and `close` is a collective call. A save goes through two jobs, each in a thread of
    this process: every rank writes its shards; then rank 0 publishes. `poll` moves it on; it costs one all-reduce of
    two integers, and only while a save is under way.

    Args:
        folder: where checkpoints lie.
        chunks: the model on this rank.
        optimizer: its optimizer.
        retention: which older checkpoints stay.
        in_background: let training go on, up to its next update, which must `wait_for_copy`; otherwise `save` waits
            until all is published.
    """

    def __init__(
        self,
        folder: Path,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        retention: Retention = Retention(),  # noqa: B008 - frozen
        *,
        in_background: bool = False,
    ) -> None:
        self._folder = folder
        self._chunks = chunks
        self._optimizer = optimizer
        self._retention = retention
        self._staging = StagingBuffer() if in_background else None
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="copy")  # apart: a copy never waits for the disk
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._abandon = threading.Event()
        self._save: _Save | None = None
        self._is_validated = False

    def save(self, step: int, record: Record) -> Path | None:
        """Save the state as it is now under `step`; `finish` the save before this one first.

        Returns:
            The published checkpoint, or None where it is still written in the background.

        Raises:
            CptError: the checkpoint's folder cannot be made; without a background also all that `poll` raises.
        """
        assert self._save is None, "finish the save before this one first"
        name = layout.checkpoint_name(step)
        aside, final = self._folder / f".{name}.tmp", self._folder / name
        self._prepare(step, aside, record)
        state = state_dicts.training_state(self._chunks, self._optimizer, is_loading=False, with_rng=True)
        plan = plan_shards(state, aside, validate=not self._is_validated)
        self._is_validated = True  # the shards of a run do not change
        if self._staging is not None:
            self._staging.follow()
        files = self._copier.submit(_copied, plan.files, self._staging)
        job = self._thread.submit(lambda: write_files(aside, files.result(), self._abandon))
        self._save = _Save(step, aside, final, plan.metadata, files, job)
        return None if self._staging is not None else self.finish()

    def wait_for_copy(self) -> None:
        """Wait until the state of the save under way may change; no collective call, and free where none is."""
        if self._save is not None:
            wait([self._save.files])

    def poll(self) -> Path | None:
        """Move a save on as far as it goes without waiting.

        Returns:
            The checkpoint, in the one call that finds it published.

        Raises:
            CptError: some rank could not write; raised on all ranks, and the checkpoints before are as they were.
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
            self._thread.submit(delete, save.job.result())  # nobody waits for that; the next save runs after it
            return save.final
        self._publish(save)
        return None

    def finish(self) -> Path | None:
        """Wait for the save under way.

        Returns:
            Its checkpoint; None where none was under way.

        Raises:
            CptError: as in `poll`.
        """
        path = None
        while self._save is not None:
            wait([self._save.job])
            path = self.poll()
        return path

    def close(self) -> None:
        """Give up what is under way and end the threads; no collective call, so that it can follow any failure."""
        self._abandon.set()
        self._copier.shutdown()
        self._thread.shutdown()

    def _prepare(self, step: int, aside: Path, record: Record) -> None:
        problem = None
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                sync_folder(self._folder.parent)
                record.write(aside)
            except OSError as error:
                problem = str(error)
        told = [problem]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise CptError(_message(step, [f"rank 0: {told[0]}"]))

    def _publish(self, save: _Save) -> None:
        """Let rank 0 publish what every rank has written."""
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


def save_checkpoint(
    folder: Path,
    step: int,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    record: Record,
    retention: Retention = Retention(),  # noqa: B008 - frozen
) -> Path:
    """Save once, and wait for it; a collective call.

    A checkpoint appears under its name complete or not at all. Older ones are removed after that.

    Returns:
        The published folder.

    Raises:
        CptError: some rank could not write.
    """
    saver = Saver(folder, chunks, optimizer, retention)
    try:
        path = saver.save(step, record)
    finally:
        saver.close()
    assert path is not None
    return path


def _copied(files: Files, staging: StagingBuffer | None) -> Files:
    """The same content over copies of its tensors; itself where there is nothing to copy to."""
    if staging is None:
        return files
    tensors = [entry.data for content in files.values() for entry in content if isinstance(entry.data, torch.Tensor)]
    copies = iter(staging.copy(tensors))

    def copied(entry: ShardEntry) -> ShardEntry:
        return replace(entry, data=next(copies)) if isinstance(entry.data, torch.Tensor) else entry

    return {name: [copied(entry) for entry in content] for name, content in files.items()}


def _any(*flags: bool) -> list[bool]:
    """For each flag, whether some rank has it; a collective call."""
    tensor = torch.tensor(flags, dtype=torch.int32)
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def _message(step: int, reasons: Sequence[str]) -> str:
    return (
        f"the checkpoint of step {step} was not written: {'; '.join(reasons)}; the checkpoints before it are as they "
        "were; make room or mend the disk, and start the run again"
    )
