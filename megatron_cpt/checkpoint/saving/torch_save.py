"""Writing tensors with `torch.save` to a stream that hashes them and starts writing to the disk at once."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from megatron_cpt.files.checksum import Checksum
from megatron_cpt.files.whole_io import DiskFile

_BLOCK_BYTES = 16 << 20
_SMALL_BYTES = 1 << 16


class AbandonedError(Exception):
    """The run ended before its checkpoint was written."""


def save_tensor(tensor: torch.Tensor, stream: HashedStream) -> None:
    """Write a tensor of any device and strides.

    The zip format's CRC-32 is omitted: it costs 0.4 s per GB, and the manifest has a checksum.

    Raises:
        AbandonedError, OSError: the failure of the stream, which torch reports only as a cut zip file.
    """
    has_crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # for this thread only
    try:
        torch.save(_with_own_storage(tensor), stream)  # type: ignore[arg-type]  # it only writes and flushes
    except RuntimeError as error:
        raise (stream.failure or error) from error
    finally:
        torch.serialization.set_crc32_options(has_crc)


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the CPU with a storage of its own size: torch.save writes whole storages, even for views."""
    tensor = tensor.cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    as_bytes = torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy())  # the same memory
    return as_bytes.view(tensor.dtype).view(tensor.shape)


class HashedStream:
    """Writable stream for `torch.save` that computes a checksum of its content.

    Args:
        raw: an unbuffered file.
        abandon: when it is set, the next write raises.

    Attributes:
        failure: the exception of a write, for callers of code that hides it.
    """

    def __init__(self, raw: DiskFile, abandon: threading.Event | None = None) -> None:
        self._raw, self._abandon = raw, abandon
        self._checksum, self._position = Checksum(), 0
        self._small = bytearray()
        self.failure: Exception | None = None

    def tell(self) -> int:
        """Bytes written so far."""
        return self._position

    def checksum(self) -> str:
        """Return the checksum of the content; call `flush` first."""
        assert not self._small
        return self._checksum.hexdigest()

    def write(self, data: Any) -> int:
        """Write `data`, any object with a buffer; small pieces are collected."""
        view = memoryview(data).cast("B")
        self._position += len(view)
        if len(view) < _SMALL_BYTES:
            self._small += view
            if len(self._small) >= _SMALL_BYTES:
                self.flush()
        else:
            self.flush()
            self._write_blocks(view)
        return len(view)

    def flush(self) -> None:
        """Write the small pieces that were collected."""
        if self._small:
            collected, self._small = self._small, bytearray()
            self._write_blocks(memoryview(collected))

    def _write_blocks(self, view: memoryview) -> None:
        try:
            for start in range(0, len(view), _BLOCK_BYTES):
                if self._abandon is not None and self._abandon.is_set():
                    raise AbandonedError
                block = view[start : start + _BLOCK_BYTES]
                self._checksum.update(block)
                begin = os.lseek(self._raw.fileno(), 0, os.SEEK_CUR)
                self._raw.write(block)
                if hasattr(os, "posix_fadvise"):  # on Linux this starts writing to the disk and does not wait
                    os.posix_fadvise(self._raw.fileno(), begin, len(block), os.POSIX_FADV_DONTNEED)
        except (AbandonedError, OSError) as error:
            self.failure = error
            raise
