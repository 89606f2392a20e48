"""Reading tensors of a checkpoint straight into the run's memory, in several threads.

torch's own reader takes one tensor after the other and copies each three times: out of the file, out of its zip
archive, into the target. Here the place of a tensor's bytes in the file is looked up, and the operating system copies
from there into the target.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_cpt.checkpoint.loading.stored_state import StoredBox
from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.checkpoint.torchfile.torch_file import open_torch_file
from megatron_cpt.errors import RefusedError

MAX_THREADS = 4
PIECE_BYTES = 8 << 20  # per read if a target has another dtype or layout than the file

BeforeRead = Callable[[Path, int], None]


@dataclass(frozen=True)
class BoxRead:
    """One read: the part of a stored box that begins at `offsets`, into memory of the part's shape."""

    source: StoredBox
    offsets: tuple[int, ...]
    target: torch.Tensor


def plan_reads(target: torch.Tensor, offsets: Sequence[int], boxes: Iterable[StoredBox]) -> list[BoxRead]:
    """Return the reads that fill a box of a tensor from the boxes in which the tensor was stored.

    Example: a tensor of 8 rows was stored as rows 0 to 3 and rows 4 to 7. A target of 3 rows at offset 3 takes row 3 of
    the first box into its row 0, and rows 0 and 1 of the second box into its rows 1 and 2.

    Args:
        target: memory for the box.
        offsets: where the box begins in the tensor, one number per dimension.
        boxes: the stored boxes, also some that do not overlap the target.
    """
    reads = []
    for box in boxes:
        starts = [max(pair) for pair in zip(offsets, box.offsets, strict=True)]
        target_ends = map(sum, zip(offsets, target.shape, strict=True))
        box_ends = map(sum, zip(box.offsets, box.sizes, strict=True))
        ends = [min(pair) for pair in zip(target_ends, box_ends, strict=True)]
        if all(start < end for start, end in zip(starts, ends, strict=True)):
            inside = zip(starts, ends, offsets, strict=True)
            part = target[tuple(slice(start - offset, end - offset) for start, end, offset in inside)]
            within = tuple(start - offset for start, offset in zip(starts, box.offsets, strict=True))
            reads.append(BoxRead(box, within, part))
    return reads


def read_boxes(reads: Sequence[BoxRead], before_read: BeforeRead = lambda path, end: None) -> None:
    """Read everything that was planned, in several threads: reading and copying release Python's lock.

    Args:
        reads: their targets do not overlap.
        before_read: called in a reading thread with a shard and the end of what is about to be read from it.

    Raises:
        RefusedError: a shard is damaged.
        OSError: a shard cannot be read.
    """

    def read(part: Sequence[BoxRead]) -> None:
        for one in part:
            source = one.source
            before_read(source.path, source.start + source.length)
            stored = open_torch_file(source.path, source.start, source.length)
            if not isinstance(stored, StoredTensor):
                raise RefusedError(f"{source.path}: no tensor at byte {source.start}; the file is damaged")
            read_box(stored, one.offsets, one.target)

    with ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="load") as threads:
        list(threads.map(read, _divide(reads, min(MAX_THREADS, os.cpu_count() or 1))))


def read_box(stored: StoredTensor, offsets: Sequence[int], target: torch.Tensor) -> None:
    """Read a box of a stored tensor.

    Args:
        stored: the tensor in its file.
        offsets: where the box begins in the tensor, one number per dimension.
        target: memory of the box's shape, on any device, of any dtype and strides.

    Raises:
        RefusedError: the box reaches beyond the end of the tensor or of the file.
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
    """Read into the target directly if its bytes are laid out as in the file, else through pieces of whole rows."""
    while target.ndim > 1 and len(target) == 1:
        stored, offsets, target = stored.select(offsets[0]), offsets[1:], target[0]
    stored = stored.rows(offsets[0], offsets[0] + len(target))
    is_same_layout = target.is_cpu and target.is_contiguous() and target.dtype == stored.dtype
    if is_same_layout and stored.shape == target.shape:
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


def _divide(reads: Sequence[BoxRead], num_parts: int) -> list[list[BoxRead]]:
    """Divide the reads into runs of neighbors in the files, of about the same number of bytes each."""
    parts: list[list[BoxRead]] = [[] for _ in range(num_parts)]
    total, done = sum(read.target.nbytes for read in reads), 0
    for read in sorted(reads, key=lambda read: (read.source.path, read.source.start)):
        parts[done * num_parts // max(total, 1)].append(read)
        done += read.target.nbytes
    return [part for part in parts if part]
