"""Host memory for the copy of the state that a background save writes; one buffer is kept from save to save."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNMENT = 64


class StagingBuffer:
    """Host memory for one save at a time; pinned if there is a GPU, so that the copy runs at the speed of the bus.

    The buffer grows to the size of a save and is reused by the next one: the caller waits for the writer before it
    copies again. It is created in the training thread; `copy` may run in any other.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        # A separate stream: on the training stream, copies and training would wait for each other's queued work.
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return self._memory.nbytes

    def wait_for_device(self) -> None:
        """Make the next copy start after the work that this thread has queued on the device so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors of any device, shape and strides into the buffer; then the originals may change.

        Returns:
            Contiguous copies, valid until the next call.
        """
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
        copies = []
        with torch.cuda.stream(self._stream):  # also selects its device in this thread, for the pinned memory
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
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old buffer before allocating the larger one
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
