"""Micro-batches on the device: one pinned buffer, one copy and one event per training step.

A copy from ordinary memory makes the host wait until the GPU has done everything that was issued before. So the
loader's thread copies a whole step while the previous one computes, from pinned memory and on a stream of its own; the
training thread only tells its stream to wait for the copy's event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_cpt.data import Batch

_ALIGNMENT = 64  # bytes; at least 16, the widest load of a kernel


@dataclass(frozen=True)
class DeviceBatch:
    """Micro-batch as tensors on the device; the first five fields are as in `Batch`.

    Attributes:
        attention_documents: int32 (micro, S), as in `Batch`; None unless attention is reset by a mask.
        sequence_bounds: int32, start of each packed document and end of the last one; None unless attention is reset
            by packing.
        longest_sequence: tokens of the longest packed document.
        source_set: the different values of `sources`, on the host.
        teacher_ids: uint16 or uint32 (micro, S, k), as in `TeacherTargets`; None without a cached teacher.
        teacher_log_probs: float16 (micro, S, k).
        teacher_log_tail: float16 (micro, S).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    sources: torch.Tensor
    attention_documents: torch.Tensor | None = None
    sequence_bounds: torch.Tensor | None = None
    longest_sequence: int = 0
    source_set: frozenset[int] = frozenset()
    teacher_ids: torch.Tensor | None = None
    teacher_log_probs: torch.Tensor | None = None
    teacher_log_tail: torch.Tensor | None = None

    @property
    def row_shape(self) -> tuple[int, int]:
        """Rows and their length as the model gets them: packed documents are one row."""
        rows, length = self.tokens.shape
        return (rows, length) if self.sequence_bounds is None else (1, rows * length)


@dataclass(frozen=True)
class ModelInputs:
    """Arguments of megatron-core's GPT for one micro-batch, the part of this context-parallel rank.

    Attributes:
        positional: tokens, position ids, and the attention mask or None.
        labels: in the shape of the tokens.
        loss_mask: (micro, S), also for packed documents.
        packing: arguments by name for packed documents.
    """

    positional: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    labels: torch.Tensor
    loss_mask: torch.Tensor
    packing: dict[str, Any]


def model_inputs(batch: DeviceBatch, context_parallel_size: int) -> ModelInputs:
    """Return the arguments of the model for a micro-batch."""
    names = ("tokens", "position_ids", "labels", "loss_mask")
    tensors = {name: getattr(batch, name) for name in names}
    if batch.attention_documents is not None:
        tensors["attention_mask"] = document_mask(batch.attention_documents)
    if context_parallel_size > 1:
        from megatron.core.utils import get_batch_on_this_cp_rank

        tensors = get_batch_on_this_cp_rank(tensors)
    tokens, positions, labels = (tensors[name] for name in names[:3])
    packing = {}
    if batch.sequence_bounds is not None:
        tokens, positions, labels = (tensor.view(1, -1) for tensor in (tokens, positions, labels))
        packing = {"packed_seq_params": _packed_sequences(batch.sequence_bounds, batch.longest_sequence)}
    mask = tensors.get("attention_mask")
    return ModelInputs((tokens, positions, mask), labels, tensors["loss_mask"], packing)


def _packed_sequences(bounds: torch.Tensor, longest: int) -> Any:
    """Return packed documents in megatron-core's `thd` format."""
    from megatron.core.packed_seq_params import PackedSeqParams

    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """Return the attention mask that hides later tokens and other documents.

    Args:
        documents: (b, s) number of each token's document.

    Returns:
        bool (b, 1, s, s), True where attention is forbidden, as megatron-core defines it.
    """
    length = documents.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=documents.device).triu(1)
    other = documents[:, :, None] != documents[:, None, :]
    return (later | other)[:, None]


@dataclass(frozen=True)
class Uploaded:
    """Micro-batches whose copy to the device may still be running.

    Attributes:
        batches: views of `memory`.
        memory: all tensors of the step in one buffer on the device; None on a CPU.
        copied: event after the copy; None on a CPU.
    """

    batches: Sequence[DeviceBatch]
    memory: torch.Tensor | None = None
    copied: torch.cuda.Event | None = None

    def wait(self) -> Sequence[DeviceBatch]:
        """Let the current stream wait for the copy, without the host, and return the micro-batches."""
        if self.memory is not None and self.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.copied)
            self.memory.record_stream(stream)  # not reused by the copies' stream before this stream has read it
        return self.batches


Upload = Callable[[Sequence[Batch]], Uploaded]
"""Function that moves the micro-batches of a step to the device."""


def make_upload(device: torch.device, *, packs_documents: bool) -> Upload:
    """Return the upload for one thread: an `Uploader` on CUDA; on a CPU tensors that share the arrays' memory.

    Args:
        device: of the model.
        packs_documents: see `Model`.
    """
    if device.type == "cuda":
        return Uploader(device, packs_documents=packs_documents)
    return lambda batches: Uploaded([_on_host(batch, packs_documents) for batch in batches])


def _on_host(batch: Batch, packs_documents: bool) -> DeviceBatch:
    arrays, on_host = _arrays(batch, packs_documents)
    return DeviceBatch(**{**{name: torch.from_numpy(array) for name, array in arrays.items()}, **on_host})


class Uploader:
    """Upload of one thread: packs the arrays of a step into pinned memory and copies them on a stream of its own.

    Args:
        device: a CUDA device.
        packs_documents: see `Model`.
        buffers: pinned memory; None: buffers of its own.
    """

    def __init__(self, device: torch.device, *, packs_documents: bool, buffers: PinnedBuffers | None = None) -> None:
        self._device, self._packs_documents = device, packs_documents
        self._buffers = buffers or PinnedBuffers()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batches: Sequence[Batch]) -> Uploaded:
        """Start the copy of the micro-batches of a step."""
        pairs = [_arrays(batch, self._packs_documents) for batch in batches]
        arrays = [array for named, _ in pairs for array in named.values()]
        offsets, size = packed_offsets(arrays)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        pinned = self._buffers.take(size, copied)
        pack(arrays, offsets, pinned)
        with torch.cuda.stream(self._stream):  # also makes the device current, which a new thread has not done
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            memory.copy_(pinned, non_blocking=True)
            copied.record(self._stream)
        views = iter(unpack(arrays, offsets, memory))
        fields_there = [{**{name: next(views) for name in named}, **on_host} for named, on_host in pairs]
        batches_there = [DeviceBatch(**there) for there in fields_there]
        return Uploaded(batches_there, memory, copied)


class PinnedBuffers:
    """Pinned buffers that are used in turn; each one is refilled only after its last copy is done.

    Args:
        count: number of buffers.
        allocate: returns a buffer of a number of bytes.
    """

    def __init__(self, count: int = 2, allocate: Callable[[int], torch.Tensor] | None = None) -> None:
        self._allocate = allocate or (lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
        self._buffers: list[torch.Tensor | None] = [None] * count
        self._copied: list[torch.cuda.Event | None] = [None] * count
        self._turn = 0

    def take(self, size: int, copied: torch.cuda.Event) -> torch.Tensor:
        """Return a buffer of `size` bytes that no copy reads any more; waits for it if necessary.

        Args:
            size: in bytes.
            copied: event that the caller records after its copy out of the buffer.
        """
        turn, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
        previous, buffer = self._copied[turn], self._buffers[turn]
        if previous is not None:
            previous.synchronize()
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[turn] = self._allocate(size)
        self._copied[turn] = copied
        return buffer[:size]


def packed_offsets(arrays: Sequence[npt.NDArray[Any]]) -> tuple[list[int], int]:
    """Return the offset in bytes of each array in one aligned buffer, and the size of the buffer."""
    offsets, end = [], 0
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def pack(arrays: Sequence[npt.NDArray[Any]], offsets: Sequence[int], memory: torch.Tensor) -> None:
    """Copy the arrays into `memory`, uint8 on the host."""
    for array, offset in zip(arrays, offsets, strict=True):
        as_bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory[offset : offset + array.nbytes].copy_(torch.from_numpy(as_bytes))


def unpack(arrays: Sequence[npt.NDArray[Any]], offsets: Sequence[int], memory: torch.Tensor) -> list[torch.Tensor]:
    """Return views of `memory` with the shapes and types of the arrays that were packed there."""
    return [
        memory[offset : offset + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, offset in zip(arrays, offsets, strict=True)
    ]


def _arrays(batch: Batch, packs_documents: bool) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return the arrays that a model reads, by the names of `DeviceBatch`, and its fields that stay on the host."""
    arrays = {field.name: getattr(batch, field.name) for field in fields(batch)}
    on_host: dict[str, Any] = {"source_set": frozenset(batch.sources.tolist())}
    documents, targets = arrays.pop("attention_documents"), arrays.pop("teacher")
    if targets is not None:
        arrays |= {f"teacher_{field.name}": getattr(targets, field.name) for field in fields(targets)}
    if documents is not None and packs_documents:
        bounds = sequence_bounds(documents)
        arrays["sequence_bounds"], on_host["longest_sequence"] = bounds, int(np.diff(bounds).max())
    elif documents is not None:
        arrays["attention_documents"] = documents
    return arrays, on_host


def sequence_bounds(documents: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return where packed documents start, and the end of the last one, for attention kernels that take no mask.

    The samples are concatenated, and every sample and every document starts a new sequence, so no token attends to
    another document, as with a mask. Positions start at 0 in each sequence; rotary embeddings give equal scores for
    positions in the sample, because scores depend on distances only.

    Example: documents [[0, 0, 1], [1, 1, 1]] have the sequence bounds [0, 2, 3, 6].

    Args:
        documents: (b, s) number of each token's document.
    """
    is_start = np.ones(documents.shape, np.bool_)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return np.append(np.flatnonzero(is_start), documents.size).astype(np.int32)
