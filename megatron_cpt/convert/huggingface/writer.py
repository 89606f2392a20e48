"""safetensors shards written in place, a tensor (or some rows of one) at a time, in any order, by any thread.

All shapes are known before, so every header is written first and each tensor has its place. The work lies in
`NAME.partial` beside the final folder; `finish` publishes it by one rename. What is on the disk for good is in a
journal: a writer that is started again with the same plan tells what is done and goes on.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.convert.huggingface.folder import DTYPES, INDEX_FILE, SINGLE_FILE
from megatron_cpt.convert.job import check_target, named, publish, sync_file
from megatron_cpt.convert.journal import JOURNAL_FILE, Journal
from megatron_cpt.files.atomic import sync_folder

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SYNC_BYTES = 256 << 20  # how much may be written before it is forced to disk and noted in the journal
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes."""

    file: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1


def work_folder(path: Path) -> Path:
    """Where a folder lies until it is finished."""
    return path.with_name(f"{path.name}.partial")


class HfWriter:
    """Writes the weights of one Hugging Face folder.

    Attributes:
        path: the folder's final name.
        folder: where it lies until `finish`; put config.json and the tokenizer's files here.
        done: names that an earlier, interrupted writer has finished.
        total_bytes: of all tensors.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        source: str = "",
    ) -> None:
        """Lay out the shards; go on with an interrupted writer's work where its plan was the same.

        Args:
            path: the folder to make; it must not exist, or be empty.
            tensors: name -> (shape, dtype), in the order in which they are to lie.
            shard_bytes: most bytes of tensors in one file; a larger tensor has a file for itself.
            source: what the tensors come from; work from another source is thrown away, not continued.

        Raises:
            UserError: there is something under that name.
        """
        self.path = Path(path)
        check_target(self.path)
        self.folder = work_folder(self.path)
        shards = _share_out(tensors, shard_bytes)
        self._headers = {file: _header(tensors, names) for file, names in shards.items()}
        self._places = {
            name: place for file, names in shards.items() for name, place in _places(tensors, names, file).items()
        }
        self.total_bytes = sum(place.row_bytes * place.num_rows for place in self._places.values())
        self._lock = threading.Lock()  # of the lists below
        self._sync_lock = threading.Lock()
        self._rows: dict[str, list[tuple[int, int]]] = {}  # of tensors that are partly written
        self._files: dict[str, int] = {}
        self._unsynced: list[str] = []
        self._unsynced_bytes = 0
        job = [source, {file: header.hex() for file, header in self._headers.items()}]
        self._journal = Journal(self.folder, job)
        self.done = self._open()
        self._finished = set(self.done)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor."""
        place = self._places[name]
        assert tuple(tensor.shape) == place.shape, f"{name}: shape {tuple(tensor.shape)}, planned {place.shape}"
        self.write_rows(name, 0, tensor if place.shape else tensor.reshape(1))

    def write_rows(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Write rows [start, start + len(tensor)) of a tensor; each row once, in any order."""
        place = self._places[name]
        assert tensor.dtype == place.dtype, f"{name}: {tensor.dtype}, planned {place.dtype}"
        assert not place.shape or tuple(tensor.shape[1:]) == place.shape[1:], f"{name}: rows of another shape"
        stop = start + tensor.shape[0]
        assert 0 <= start <= stop <= place.num_rows, f"{name}: rows [{start}, {stop}) of {place.num_rows}"
        flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        view = memoryview(flat)
        offset, done = place.start + start * place.row_bytes, 0
        fd = self._files[place.file]
        with named(self.folder / place.file):
            while done < view.nbytes:
                done += os.pwrite(fd, view[done:], offset + done)
        os.posix_fadvise(fd, offset, view.nbytes, os.POSIX_FADV_DONTNEED)  # begins to write it to the disk
        self._note(name, place, start, stop)

    def finish(self) -> Path:
        """Force everything to disk, write the index and give the folder its name.

        Returns:
            The final folder.
        """
        missing = [name for name in self._places if name not in self._finished]
        assert not missing, f"not written: {missing[:5]}"
        self.close()
        if SINGLE_FILE not in self._headers:
            (self.folder / INDEX_FILE).write_text(self._index(), encoding="utf-8")
        self._journal.remove()
        for file in self.folder.iterdir():  # the index, and what the caller has put beside the weights
            sync_file(file)
        publish(self.folder, self.path)
        return self.path

    def close(self) -> None:
        """Note what is finished and close the files; the work can be continued."""
        try:
            self._sync(self._unsynced)
        finally:
            for fd in self._files.values():
                os.close(fd)
            self._files, self._unsynced = {}, []

    # ---------------------------------------------------------------------------------- the journal

    def _open(self) -> frozenset[str]:
        """Open the files of an interrupted writer with the same plan, or fresh ones."""
        names = [*self._headers, JOURNAL_FILE]
        # the first line is written when all files are laid out
        is_known = bool(self._journal.lines) and all((self.folder / name).is_file() for name in names)
        if is_known:
            for other in self.folder.iterdir():  # beside the weights, of an earlier call that came as far as `finish`
                if other.name not in names:
                    other.unlink()
        else:
            self._journal.restart()
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if is_known else os.O_CREAT | os.O_EXCL)
        self._files = {file: os.open(self.folder / file, flags, 0o644) for file in self._headers}
        if not is_known:
            for file, header in self._headers.items():
                with named(self.folder / file):
                    os.pwrite(self._files[file], header, 0)
                    os.ftruncate(self._files[file], len(header) + _data_bytes(self._places, file))
                    os.fsync(self._files[file])
            sync_folder(self.folder)
            self._journal.record([])
        return frozenset(name for line in self._journal.lines for name in line if name in self._places)

    def _note(self, name: str, place: _Place, start: int, stop: int) -> None:
        """Remember which rows are written; note finished tensors in the journal once they are on the disk."""
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
        self._sync(names)  # the other threads go on meanwhile

    def _sync(self, names: list[str]) -> None:
        """Data first, then the line that says it is there."""
        with self._sync_lock:
            for file, fd in self._files.items():
                with named(self.folder / file):
                    os.fdatasync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if names:
                self._journal.record(names)

    def _index(self) -> str:
        weight_map = {name: self._places[name].file for name in sorted(self._places)}
        return json.dumps({"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}, indent=2) + "\n"


def _share_out(tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], shard_bytes: int) -> dict[str, list[str]]:
    """Names of each shard file: in order, a new file when the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": names for n, names in enumerate(shards, start=1)}


def _lie(tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], names: list[str]) -> list[tuple[str, int, int]]:
    """(name, first byte, byte after the last) in a shard's data: wide types first, so that all are aligned."""
    result, at = [], 0
    for name in sorted(names, key=lambda name: -tensors[name][1].itemsize):
        shape, dtype = tensors[name]
        size = math.prod(shape) * dtype.itemsize
        result.append((name, at, at + size))
        at += size
    return result


def _header(tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], names: list[str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, start, stop in _lie(tensors, names):
        shape, dtype = tensors[name]
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _places(tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], names: list[str], file: str) -> dict[str, _Place]:
    base = len(_header(tensors, names))
    return {
        name: _Place(file, base + start, tuple(tensors[name][0]), tensors[name][1])
        for name, start, _ in _lie(tensors, names)
    }


def _data_bytes(places: Mapping[str, _Place], file: str) -> int:
    return sum(place.row_bytes * place.num_rows for place in places.values() if place.file == file)
