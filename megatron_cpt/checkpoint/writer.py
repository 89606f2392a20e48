"""Files of a checkpoint: written, hashed and made durable in one pass.

The way of a chunk to the disk begins when it is written instead of at the final fsync: the processor and the disk work
at the same time.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cpt.checkpoint.checksum import Checksum
from megatron_cpt.checkpoint.manifest import FileDigest
from megatron_cpt.checkpoint.shards import Entry
from megatron_cpt.checkpoint.torch_save import save_tensor

_CHUNK = 16 << 20
_SMALL = 1 << 16


class AbandonedError(Exception):
    """The run ends before its checkpoint was written."""


@dataclass(frozen=True)
class Written:
    """What a rank wrote.

    Attributes:
        places: where each piece of a tensor lies, for torch's metadata.
        files: size and checksum of each file.
    """

    places: list[WriteResult]
    files: dict[str, FileDigest]


def write_files(folder: Path, files: Mapping[str, Sequence[Entry]], abandon: threading.Event) -> Written:
    """Write a rank's files, a thread each; on return they are durable.

    Args:
        folder: an existing folder.
        files: name -> content.
        abandon: when set, the writing ends soon.

    Raises:
        OSError: the disk is full, a limit is reached, and the like.
        AbandonedError: `abandon` was set.
    """
    if not files:
        return Written([], {})
    with ThreadPoolExecutor(len(files), thread_name_prefix="checkpoint") as threads:
        jobs = [threads.submit(_write_file, folder / name, entries, abandon) for name, entries in files.items()]
        written = [job.result() for job in jobs]
    return Written(
        [place for part in written for place in part.places],
        {name: digest for part in written for name, digest in part.files.items()},
    )


def _write_file(path: Path, entries: Sequence[Entry], abandon: threading.Event) -> Written:
    places = []
    with open(path, "wb", buffering=0) as raw:
        stream = HashedStream(raw, abandon)
        for entry in entries:
            start = stream.tell()
            _write_entry(entry, stream)
            length = stream.tell() - start
            places.append(WriteResult(entry.item.index, length, _StorageInfo(path.name, start, length)))
        stream.flush()
        os.fsync(raw.fileno())
    return Written(places, {path.name: FileDigest(stream.tell(), stream.checksum())})


def _write_entry(entry: Entry, stream: HashedStream) -> None:
    if isinstance(entry.data, io.BytesIO):
        stream.write(entry.data.getbuffer())
        return
    save_tensor(_alone(entry.data), stream)


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
        abandon: when set, the next write raises.

    Attributes:
        failure: what a write raised, for callers between here and there that hide it.
    """

    def __init__(self, raw: io.FileIO, abandon: threading.Event) -> None:
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
                if self._abandon.is_set():
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
