"""A copy of the state that training may go on beside: one buffer of host memory, kept from save to save."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNMENT = 64


class StagingBuffer:
    """Host memory for one save; pinned where there is a GPU, so that the copy runs at the speed of the bus.

    It grows to what one save needs and is used again by the next. It belongs to one save at a time: the caller waits
    for the writer before it copies anew.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Host memory held."""
        return self._memory.nbytes

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors, of any device, shape and stride, into the buffer.

        Returns:
            Contiguous copies, valid until the next call; when it returns, the originals may change.
        """
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
        if starts[-1] > self._memory.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is made
            self._memory = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies = []
        for tensor, start in zip(tensors, starts, strict=False):
            place = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor, non_blocking=True)
            copies.append(place)
        torch.cuda.synchronize()
        return copies
