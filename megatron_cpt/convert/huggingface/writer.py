"""Writer of safetensors shards: a tensor, or some of its rows, at a time, in any order, from any thread.

All shapes are known beforehand, so the headers are written first and each tensor has a fixed place. Example: "a" of
shape (2, 3) in fp32 and "b" of shape (4,) in bf16. The file has 8 bytes for the header's length, 144 bytes of header,
then "a" at bytes 152 to 175 and "b" at bytes 176 to 183. Row 1 of "a" goes to bytes 164 to 175.

The files are in the work folder `NAME.partial` until `finish` renames it to NAME; see `convert.job`.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from megatron_cpt.convert.huggingface.folder import INDEX_FILE, SINGLE_FILE
from megatron_cpt.convert.huggingface.header import DTYPES, TensorInfo
from megatron_cpt.convert.job import JOURNAL_FILE, JobFolder, group_by_size
from megatron_cpt.files.atomic import sync_folder
from megatron_cpt.files.resumable import SETTINGS_FILE
from megatron_cpt.files.retry import name_file_in_errors
from megatron_cpt.files.whole_io import DiskFile, is_regular_file, write_content

TensorSizes = Mapping[str, tuple[Sequence[int], torch.dtype]]
"""Name -> (shape, dtype), in the order in which the tensors are to be stored."""

DEFAULT_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SYNC_BYTES = 256 << 20  # bytes between two calls of fdatasync, each followed by a line in the journal


def work_folder(path: Path) -> Path:
    """Return the folder in which the writer of `path` works until it finishes."""
    return path.with_name(f"{path.name}.partial")


class HfWriter:
    """Writer of the weights of one Hugging Face folder.

    Attributes:
        path: final name of the folder.
        folder: work folder; put config.json and the tokenizer's files here before `finish`.
        done: names of tensors that an earlier, interrupted writer has finished.
        total_bytes: size of all tensors.
    """

    def __init__(
        self, path: str | Path, tensors: TensorSizes, shard_bytes: int = DEFAULT_SHARD_BYTES, *, source: str = ""
    ) -> None:
        """Lay out the shards, or resume if an interrupted writer had the same plan and source.

        Args:
            path: the folder to create; it must not exist, or be empty.
            shard_bytes: largest number of bytes of tensors in one file. A larger tensor gets a file of its own.
            source: identity of the source. If it differs from the interrupted writer's, its work is discarded.

        Raises:
            UserError: the folder exists, another process is writing it, or the disk is too small.
        """
        self.path = Path(path)
        self.folder = work_folder(self.path)
        self._headers: dict[Path, bytes] = {}
        self._places: dict[str, TensorInfo] = {}
        for file_name, names in _assign_to_shards(tensors, shard_bytes).items():
            file = self.folder / file_name
            self._headers[file], places = _lay_out(tensors, names, file)
            self._places |= places
        self.total_bytes = sum(place.num_bytes for place in self._places.values())
        self._lock = threading.Lock()  # guards the attributes below, except _files
        self._sync_lock = threading.Lock()
        self._rows: dict[str, list[tuple[int, int]]] = {}  # rows written, of tensors that are not complete
        self._unsynced: list[str] = []  # complete tensors that may not be on the disk
        self._unsynced_bytes = 0
        self._files: dict[Path, DiskFile] = {}
        job = {"source": source, "headers": {file.name: header.hex() for file, header in self._headers.items()}}
        self._work = JobFolder(self.folder, self.path, job, needed_bytes=self.total_bytes)
        self._work.__enter__()
        try:
            self.done = self._open_files()
        except BaseException:
            self.close()
            raise
        self._finished = set(self.done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._close_files()
        finally:
            self._work.__exit__(kind, error, trace)

    def write_rows(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Write rows [start, start + len(tensor)) of a tensor; each row once, in any order."""
        place = self._places[name]
        assert tensor.dtype == place.dtype, f"{name}: {tensor.dtype}, planned {place.dtype}"
        assert not place.shape or tuple(tensor.shape[1:]) == place.shape[1:], f"{name}: rows of another shape"
        stop = start + tensor.shape[0]
        assert 0 <= start <= stop <= place.num_rows, f"{name}: rows [{start}, {stop}) of {place.num_rows}"
        numbers: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        offset, file = place.start + start * place.row_bytes, self._files[place.file]
        file.write_at(numbers, offset)
        os.posix_fadvise(file.fileno(), offset, numbers.nbytes, os.POSIX_FADV_DONTNEED)  # starts writing to the disk
        self._note_rows(name, place, start, stop)

    def finish(self) -> Path:
        """Write the index, wait until everything is on the disk, and publish the folder; return its final path."""
        missing = [name for name in self._places if name not in self._finished]
        assert not missing, f"not written: {missing[:5]}"
        self._close_files()
        if len(self._headers) > 1:
            weight_map = {name: self._places[name].file.name for name in sorted(self._places)}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_content(self.folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
        self._work.publish()
        self._work.__exit__(None, None, None)
        return self.path

    def close(self) -> None:
        """Record finished tensors and close the files; a later writer can resume."""
        self.__exit__(None, None, None)

    def _close_files(self) -> None:
        try:
            self._sync(self._unsynced)
        finally:
            for file in self._files.values():
                file.close()
            self._files, self._unsynced = {}, []

    def _open_files(self) -> frozenset[str]:
        """Open the files of the interrupted writer, or create new ones; return the names of finished tensors."""
        files = [*self._headers, self.folder / JOURNAL_FILE, self.folder / SETTINGS_FILE]
        # the first record is written when all files have their final size
        is_laid_out = bool(self._work.journal.lines) and all(map(is_regular_file, files))
        if is_laid_out:
            for other in self.folder.iterdir():  # config.json and the like, if the earlier call came that far
                if other not in files:
                    other.unlink()
        else:
            self._work.start_from_scratch()
        for file in self._headers:
            self._files[file] = DiskFile(file, "r+b" if is_laid_out else "xb", flags=os.O_NOFOLLOW)
        if not is_laid_out:
            for file, header in self._headers.items():
                size = max((place.stop for place in self._places.values() if place.file == file), default=len(header))
                self._files[file].write_at(header, 0)
                with name_file_in_errors(file):
                    self._files[file].truncate(size)
                self._files[file].sync()
            sync_folder(self.folder)
            self._work.journal.record([])
        return frozenset(name for record in self._work.journal.lines for name in record if name in self._places)

    def _note_rows(self, name: str, place: TensorInfo, start: int, stop: int) -> None:
        """Remember which rows are written, and record finished tensors once they are on the disk."""
        with self._lock:
            rows = self._rows.setdefault(name, [])
            assert all(stop <= first or last <= start for first, last in rows), f"{name}: rows written twice"
            rows.append((start, stop))
            self._unsynced_bytes += (stop - start) * place.row_bytes
            if sum(last - first for first, last in rows) == place.num_rows:
                del self._rows[name]
                self._finished.add(name)
                self._unsynced.append(name)
            if self._unsynced_bytes < _SYNC_BYTES:
                return
            names, self._unsynced, self._unsynced_bytes = self._unsynced, [], 0
        self._sync(names)  # outside the lock, so that other threads continue to write

    def _sync(self, names: list[str]) -> None:
        """Write the data to the disk first, then the journal's line about it."""
        with self._sync_lock:
            for file in self._files.values():
                file.sync()
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if names:
                self._work.journal.record(names)


def _assign_to_shards(tensors: TensorSizes, shard_bytes: int) -> dict[str, list[str]]:
    """Return the names per shard file."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}
    shards = group_by_size(sizes, shard_bytes)
    if len(shards) <= 1:
        return {SINGLE_FILE: list(tensors)}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": names for n, names in enumerate(shards, start=1)}


def _lay_out(tensors: TensorSizes, names: list[str], file: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return the header of a shard and the places of its tensors: wide dtypes first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(names, key=lambda name: -tensors[name][1].itemsize):
        shape, dtype = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        offsets[name] = (start, end)
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    places = {
        name: TensorInfo(tuple(tensors[name][0]), tensors[name][1], file, len(header) + start, len(header) + stop)
        for name, (start, stop) in offsets.items()
    }
    return header, places
