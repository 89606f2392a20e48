"""Writing the files of a checkpoint: written, hashed and made durable in one pass.

A block starts on its way to the disk when it is written, not at the final fsync, so that the processor and the disk
work at the same time.
"""

from __future__ import annotations

import io
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
from megatron_cpt.files.whole_io import DiskFile


@dataclass(frozen=True)
class Written:
    """Report of a rank about the files that it has written.

    Attributes:
        places: place of each box of a tensor in the files, for torch's metadata.
        files: size and checksum of each file.
    """

    places: list[WriteResult]
    files: dict[str, FileDigest]


def write_files(folder: Path, files: Mapping[str, Sequence[ShardEntry]], abandon: threading.Event) -> Written:
    """Write a rank's files, one thread per file; on return they are durable.

    Raises:
        OSError: for example, the disk is full or a limit is reached.
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
    with DiskFile(path, "wb") as raw:
        stream = HashedStream(raw, abandon)
        for entry in entries:
            start = stream.tell()
            if isinstance(entry.data, io.BytesIO):
                stream.write(entry.data.getbuffer())
            else:
                save_tensor(entry.data, stream)
            length = stream.tell() - start
            places.append(WriteResult(entry.item.index, length, _StorageInfo(path.name, start, length)))
        stream.flush()
        raw.sync()
    return Written(places, {path.name: FileDigest(stream.tell(), stream.checksum())})
