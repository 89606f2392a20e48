"""`torch.save` of one tensor into a stream that hashes what it is given."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Stream(Protocol):
    """A writable file."""

    @property
    def failure(self) -> Exception | None:
        """What a write of it raised, if one did."""
        ...

    def write(self, data: Any) -> int:
        """Take all of `data`."""
        ...

    def flush(self) -> None:
        """Hand on what was collected."""
        ...


def save_tensor(tensor: torch.Tensor, stream: Stream) -> None:
    """Write a tensor without the zip format's CRC-32: it costs 0.4 s/GB, and the manifest has a checksum.

    Raises:
        Exception: the stream's own failure, of which torch only says that its zip file is cut.
    """
    has_crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # of this thread alone
    try:
        torch.save(tensor, stream)  # type: ignore[arg-type]  # it only writes and flushes
    except RuntimeError as error:
        raise (stream.failure or error) from error
    finally:
        torch.serialization.set_crc32_options(has_crc)
