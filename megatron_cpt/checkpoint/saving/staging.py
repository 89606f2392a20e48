"""Host memory for the copy of the state that a background save writes; it is kept from save to save."""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_PIECE_BYTES = 1 << 30


class StagingBuffer:
    """Host memory for one save at a time; pinned if there is a GPU, so that the copy runs at the speed of the bus.

    The memory has the size of a save. (torch's allocator of pinned memory would round it up to a power of two: 64 GiB
    for 33 GB.) It is one range of addresses, so every copy is contiguous, and it is pinned in pieces. One call of CUDA
    must not touch two pieces, so a tensor that spans a boundary is copied in parts. Example: with pieces of 1,024
    bytes, tensors of 960 and 128 bytes begin at 0 and 960; the second one is copied as 960 to 1,024 and 1,024 to 1,088.

    The memory grows to the largest save: the caller waits for the writer before it copies again. The buffer is created
    in the training thread; `reserve` and `copy` may run in any other, one at a time.

    Args:
        piece_bytes: size of a piece, a multiple of the page size.
    """

    def __init__(self, piece_bytes: int = _PIECE_BYTES) -> None:
        assert piece_bytes % mmap.PAGESIZE == 0
        self._piece_bytes = piece_bytes
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned: list[int] = []  # addresses of the pieces
        # A separate stream: on the training stream, copies and training would wait for each other's queued work.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        """Size of the memory."""
        return self._memory.nbytes

    def wait_for_device(self) -> None:
        """Make the next copy start after the work that this thread has queued on the device so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def reserve(self, sizes: Sequence[int]) -> None:
        """Allocate and pin the memory for tensors of these sizes in bytes, which takes seconds for many GB."""
        with torch.cuda.stream(self._stream):  # also selects its device in this thread, for the pinned memory
            self._grow(_starts(sizes)[-1])

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors of any device, shape and strides into the memory; then the originals may change.

        Returns:
            Contiguous copies, valid until the next call.
        """
        starts = _starts([tensor.nbytes for tensor in tensors])
        copies = []
        with torch.cuda.stream(self._stream):
            self._grow(starts[-1])
            for tensor, start in zip(tensors, starts, strict=False):
                place = self._memory[start : start + tensor.nbytes]
                self._copy_in_parts(place, tensor, start)
                copies.append(place.view(tensor.dtype).view(tensor.shape))
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def close(self) -> None:
        """Release the memory; no copy may be in use any more."""
        for address in self._pinned:
            _cudart().cudaHostUnregister(address)
        self._pinned = []
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _copy_in_parts(self, place: torch.Tensor, tensor: torch.Tensor, start: int) -> None:
        """Copy the tensor to its place, which begins at byte `start` of the memory."""
        cuts = list(_cuts(start, start + tensor.nbytes, self._piece_bytes))
        if len(cuts) <= 2:  # inside one piece
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
            return
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        for first, end in pairwise(cuts):
            part = slice(first - start, end - start)
            place[part].copy_(flat[part], non_blocking=True)

    def _grow(self, num_bytes: int) -> None:
        if num_bytes <= self._memory.nbytes:
            return
        self.close()  # before the larger memory is allocated
        # Pages of its own: two registrations must not share one.
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory = torch.frombuffer(pages, dtype=torch.uint8)
        if self._stream is not None:
            self._pin()

    def _pin(self) -> None:
        """Pin the memory piece by piece; memory that cannot be pinned is used unpinned, which is slower."""
        for first in range(0, self._memory.nbytes, self._piece_bytes):
            piece = self._memory[first : first + self._piece_bytes]
            error = int(_cudart().cudaHostRegister(piece.data_ptr(), piece.nbytes, 0))
            if error:
                logger.warning(
                    "asynchronous checkpoints: only %.1f of %.1f GiB of host memory could be pinned (CUDA error %d); "
                    "copies of the rest are slower",
                    first / (1 << 30), self._memory.nbytes / (1 << 30), error,
                )  # fmt: skip
                # The failed call leaves its error behind, and the next launch of a kernel would raise it.
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device="cuda")
                return
            self._pinned.append(piece.data_ptr())


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Return where each tensor begins, and where the last one ends."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _cuts(start: int, end: int, piece_bytes: int) -> Iterator[int]:
    """Yield `start`, the boundaries of pieces in between, and `end`."""
    yield start
    yield from range((start // piece_bytes + 1) * piece_bytes, end, piece_bytes)
    yield end
