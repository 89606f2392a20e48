"""Writing a checkpoint: aside, checksummed by the ranks that wrote it, published by one rename."""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.checkpoint import layout, sharded
from megatron_cpt.checkpoint.manifest import FileDigest, digest, manifest_text
from megatron_cpt.data.durable import sync_folder


@dataclass(frozen=True)
class Record:
    """What a checkpoint says in plain text beside its tensors.

    Attributes:
        state: counters, layout and versions, JSON-able (state.json).
        run: the resolved run.yaml as text.
        plan: the plan, JSON-able (plan.json).
    """

    state: dict[str, Any]
    run: str
    plan: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    record: Record,
    *,
    keep: int | None = None,
) -> Path:
    """Save weights, optimizer and random states of all ranks with the record; a collective call.

    A checkpoint appears under its name complete or not at all. Older ones beyond `keep` are removed after that.

    Returns:
        The published folder.
    """
    aside, final = folder / f".{layout.checkpoint_name(step)}.tmp", folder / layout.checkpoint_name(step)
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write_record(aside, record)
    dist.barrier()
    _write_tensors(aside, chunks, optimizer)
    files = _gather(_digest_own_files(aside))
    if is_main:
        _publish(aside, final, files)
        _prune(folder, keep)
    dist.barrier()
    return final


def _write_record(aside: Path, record: Record) -> None:
    (aside / layout.STATE_FILE).write_bytes(orjson.dumps(record.state, option=orjson.OPT_INDENT_2))
    (aside / layout.PLAN_FILE).write_bytes(orjson.dumps(record.plan, option=orjson.OPT_INDENT_2))
    (aside / layout.RUN_FILE).write_text(record.run, encoding="utf-8")


def _write_tensors(aside: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    # megatron-core hands results over through a queue in a process of its own, which costs seconds to start and is of
    # use to asynchronous callers only; here the results never leave this process.
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    model = sharded.model_state(chunks)
    state = {
        **model,
        "optimizer": sharded.optimizer_state(optimizer, model, is_loading=False),
        "rng": sharded.random_state(),
    }
    dist_checkpointing.save(state, str(aside))


def _digest_own_files(aside: Path) -> dict[str, FileDigest]:
    """Measure and make durable what this rank wrote: its shards `__RANK_*`, and on rank 0 everything else."""
    rank = dist.get_rank()
    own = {}
    for path in sorted(aside.iterdir()):
        writer = path.name.split("_")[2] if path.name.startswith("__") else "0"
        if writer == str(rank):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            own[path.name] = digest(path)
    return own


def _gather(own: dict[str, FileDigest]) -> dict[str, FileDigest]:
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, parts, dst=0)
    return {name: value for part in parts or [] for name, value in part.items()}


def _publish(aside: Path, final: Path, files: dict[str, FileDigest]) -> None:
    layout.write_atomically(aside / layout.MANIFEST_FILE, manifest_text(files))
    if final.exists():  # the same step once more, after a resume from an older checkpoint
        shutil.rmtree(final)
    os.rename(aside, final)
    sync_folder(final.parent)
    layout.write_atomically(final.parent / layout.LATEST_FILE, f"{final.name}\n")


def _prune(folder: Path, keep: int | None) -> None:
    for old in layout.list_checkpoints(folder)[: -keep if keep else 0]:
        # Renamed first: a checkpoint that is half deleted must not be found under a checkpoint's name.
        doomed = old.with_name(f".{old.name}.deleted")
        os.rename(old, doomed)
        shutil.rmtree(doomed)
