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

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cpt.checkpoint.manifest import FileDigest
from megatron_cpt.checkpoint.saving.torch_save import HashedStream, save_tensor
from megatron_cpt.checkpoint.saving.write_plan import ShardEntry


@dataclass(frozen=True)
class Written:
    """What a rank wrote.

    Attributes:
        places: where each piece of a tensor lies, for torch's metadata.
        files: size and checksum of each file.
    """

    places: list[WriteResult]
    files: dict[str, FileDigest]


def write_files(folder: Path, files: Mapping[str, Sequence[ShardEntry]], abandon: threading.Event) -> Written:
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


def _write_file(path: Path, entries: Sequence[ShardEntry], abandon: threading.Event) -> Written:
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


def _write_entry(entry: ShardEntry, stream: HashedStream) -> None:
    if isinstance(entry.data, io.BytesIO):
        stream.write(entry.data.getbuffer())
        return
    save_tensor(entry.data, stream)
