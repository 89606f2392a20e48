"""Reading tensors of a checkpoint straight into their place, with several threads.

torch's reader takes one tensor after the other, and copies each three times: out of the file, out of its zip archive,
into the target. Here the place of a tensor in its file is looked up, and the system copies from there into the target's
own memory. What is no plain tensor is left to torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.futures import Future

from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.checkpoint.torchfile.torch_file import open_torch_file
from megatron_cpt.errors import RefusedError

MAX_THREADS = 4
PIECE_BYTES = 8 << 20  # read at once where a target cannot take the bytes as they lie in the file

BeforeRead = Callable[[Path, int], None]


@contextlib.contextmanager
def in_threads(before_read: BeforeRead = lambda path, end: None) -> Iterator[None]:
    """Inside the block, torch's file reader shares its work among threads and reads tensors into their place.

    Reading and copying leave Python's lock, and each item goes to a place of its own.

    Args:
        before_read: called in such a thread with a file and the end of what is about to be read of it.
    """
    torchs_way = FileSystemReader.read_data

    def read_data(reader: Any, plan: LoadPlan, planner: Any) -> Future[None]:
        parts = _divide(plan.items, reader.storage_data, min(MAX_THREADS, os.cpu_count() or 1))
        with ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="load") as threads:
            jobs = [
                threads.submit(_read, reader, dataclasses.replace(plan, items=part), planner, torchs_way, before_read)
                for part in parts
            ]
            for job in jobs:
                job.result()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    FileSystemReader.read_data = read_data  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FileSystemReader.read_data = torchs_way  # type: ignore[method-assign]


def read_box(stored: StoredTensor, offsets: Sequence[int], target: torch.Tensor) -> None:
    """Read a box of a stored tensor.

    Args:
        stored: the tensor in its file.
        offsets: where the box begins in it, a number a dimension.
        target: takes the box and has its shape; of any device, type and strides.

    Raises:
        RefusedError: the file ends before the box does, or the tensor does.
    """
    shape = stored.shape
    is_inside = len(offsets) == target.ndim == len(shape) and all(
        start >= 0 and start + length <= size for start, length, size in zip(offsets, target.shape, shape, strict=True)
    )
    if not is_inside:
        raise RefusedError(
            f"{stored.path}: a tensor of shape {shape} has no box of {tuple(target.shape)} at {tuple(offsets)}; "
            "the file and .metadata do not belong together"
        )
    if target.ndim == 0:
        stored, offsets, target = dataclasses.replace(stored, shape=(1,)), (0,), target.view(1)
    if target.numel():
        _read_box(stored, offsets, target)


def _read_box(stored: StoredTensor, offsets: Sequence[int], target: torch.Tensor) -> None:
    """Straight into the target where its bytes are those in the file, else whole rows of the file a piece at a time."""
    while target.ndim > 1 and len(target) == 1:
        stored, offsets, target = stored.select(offsets[0]), offsets[1:], target[0]
    stored = stored.rows(offsets[0], offsets[0] + len(target))
    if stored.shape == target.shape and _takes_bytes(target, stored.dtype):
        stored.read_into(target)
    elif stored.num_bytes > PIECE_BYTES and len(target) > 1:
        half = len(target) // 2
        _read_box(stored, (0, *offsets[1:]), target[:half])
        _read_box(stored, (half, *offsets[1:]), target[half:])
    else:
        piece = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=target.is_cuda)
        stored.read_into(piece)
        inside = zip(offsets[1:], target.shape[1:], strict=True)
        target.copy_(piece[(slice(None), *(slice(offset, offset + length) for offset, length in inside))])


def _takes_bytes(target: torch.Tensor, dtype: torch.dtype) -> bool:
    return target.is_cpu and target.dtype == dtype and target.is_contiguous()


def _read(
    reader: Any,
    plan: LoadPlan,
    planner: Any,
    torchs_way: Callable[[Any, LoadPlan, Any], Future[None]],
    before_read: BeforeRead,
) -> None:
    """Read the items of a plan, those that are no plain tensors in torch's way."""
    left = []
    for item in plan.items:
        place = reader.storage_data[item.storage_index]
        path = Path(reader.path) / place.relative_path
        before_read(path, place.offset + place.length)
        stored = _stored(path, place, item)
        target = planner.resolve_tensor(item).detach() if stored is not None else None
        if stored is None or type(target) is not torch.Tensor:  # FP8's tensors copy in a way of their own
            left.append(item)
            continue
        read_box(stored, item.storage_offsets, target)
        planner.commit_tensor(item, target)
    if left:
        torchs_way(reader, dataclasses.replace(plan, items=left), planner)


def _stored(path: Path, place: Any, item: ReadItem) -> StoredTensor | None:
    """The tensor that an item is a box of; None where the file holds something else there."""
    if item.type != LoadItemType.TENSOR or getattr(place, "transform_descriptors", None):
        return None
    found = open_torch_file(path, place.offset, place.length)
    return found if isinstance(found, StoredTensor) else None


def _divide(items: list[ReadItem], places: dict[Any, Any], num_parts: int) -> list[list[ReadItem]]:
    """Runs of neighbors in the files, of about the same number of bytes."""

    def place(item: ReadItem) -> Any:
        return places[item.storage_index]

    items = sorted(items, key=lambda item: (place(item).relative_path, place(item).offset))
    total = sum(place(item).length for item in items)
    parts: list[list[ReadItem]] = [[] for _ in range(num_parts)]
    done = 0
    for item in items:
        parts[done * num_parts // max(total, 1)].append(item)
        done += place(item).length
    return [part for part in parts if part]
