"""A copy of the state that training may go on beside: one buffer of host memory, kept from save to save."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNMENT = 64


class StagingBuffer:
    """Host memory for one save; pinned where there is a GPU, so that the copy runs at the speed of the bus.

    It grows to what one save needs and is used again by the next. It belongs to one save at a time: the caller waits
    for the writer before it copies anew. It is made in the thread that trains; `copy` may run in any other.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        # A stream of its own: on the one that training uses, each would wait for all that the other has queued.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        """Host memory held."""
        return self._memory.nbytes

    def follow(self) -> None:
        """Let the next copy see all that this thread has asked the device to do so far, and nothing of what follows."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors, of any device, shape and stride, into the buffer.

        Returns:
            Contiguous copies, valid until the next call; when it returns, the originals may change.
        """
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
        copies = []
        with torch.cuda.stream(self._stream):  # also makes its device the one of this thread, for the pinned memory
            self._grow(starts[-1])
            for tensor, start in zip(tensors, starts, strict=False):
                place = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                place.copy_(tensor, non_blocking=True)
                copies.append(place)
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def _grow(self, num_bytes: int) -> None:
        if num_bytes > self._memory.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is made
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
