"""Tensors into a file by `torch.save`, summed on the way and begun to be written to the disk at once."""

from __future__ import annotations

import io
import os
import threading
from typing import Any

import torch

from megatron_cpt.files.checksum import Checksum

_CHUNK = 16 << 20
_SMALL = 1 << 16


class AbandonedError(Exception):
    """The run ends before its checkpoint was written."""


def save_tensor(tensor: torch.Tensor, stream: HashedStream) -> None:
    """Write a tensor, of any device and strides, and no more of its storage than itself.

    The zip format's CRC-32 is left out: it costs 0.4 s/GB, and the manifest has a checksum.

    Raises:
        AbandonedError, OSError: the stream's own failure, of which torch only says that its zip file is cut.
    """
    has_crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # of this thread alone
    try:
        torch.save(_alone(tensor), stream)  # type: ignore[arg-type]  # it only writes and flushes
    except RuntimeError as error:
        raise (stream.failure or error) from error
    finally:
        torch.serialization.set_crc32_options(has_crc)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU with a storage of its own size: torch.save writes whole storages, also of small views."""
    tensor = tensor.cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    as_bytes = torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy())  # the same memory
    return as_bytes.view(tensor.dtype).view(tensor.shape)


class HashedStream:
    """The writable half of a file, as `torch.save` needs it, with a running checksum.

    Args:
        raw: an unbuffered file.
        abandon: when set, the next write raises; None: nobody will.

    Attributes:
        failure: what a write raised, for callers between here and there that hide it.
    """

    def __init__(self, raw: io.FileIO, abandon: threading.Event | None = None) -> None:
        self._raw = raw
        self._abandon = abandon
        self._checksum = Checksum()
        self._position = 0
        self._small = bytearray()
        self.failure: Exception | None = None

    def tell(self) -> int:
        """Bytes written so far."""
        return self._position

    def checksum(self) -> str:
        """That of what was written; after `flush`."""
        assert not self._small
        return self._checksum.hexdigest()

    def write(self, data: Any) -> int:
        """Take all of `data`, any object with a buffer; small pieces are collected."""
        view = memoryview(data).cast("B")
        self._position += len(view)
        if len(view) < _SMALL:
            self._small += view
            if len(self._small) >= _SMALL:
                self.flush()
        else:
            self.flush()
            self._pass_on(view)
        return len(view)

    def flush(self) -> None:
        """Hand what was collected to the system."""
        if self._small:
            collected, self._small = self._small, bytearray()
            self._pass_on(memoryview(collected))

    def _pass_on(self, view: memoryview) -> None:
        try:
            for start in range(0, len(view), _CHUNK):
                if self._abandon is not None and self._abandon.is_set():
                    raise AbandonedError
                chunk = view[start : start + _CHUNK]
                self._checksum.update(chunk)
                self._write_through(chunk)
        except (AbandonedError, OSError) as error:
            self.failure = error
            raise

    def _write_through(self, chunk: memoryview) -> None:
        begin = os.lseek(self._raw.fileno(), 0, os.SEEK_CUR)
        done = 0
        while done < len(chunk):
            done += self._raw.write(chunk[done:]) or 0
        if hasattr(os, "posix_fadvise"):  # Linux: begins to write these pages to the disk, and does not wait
            os.posix_fadvise(self._raw.fileno(), begin, len(chunk), os.POSIX_FADV_DONTNEED)
