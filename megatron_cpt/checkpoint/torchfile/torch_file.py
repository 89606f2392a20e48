"""Reader for files of `torch.save` that executes nothing and leaves tensors on the disk.

A file of `torch.save` is an uncompressed zip archive: a pickle, `data.pkl`, and the bytes of each storage, `data/KEY`.
The unpickler here builds nothing but plain values and tensors:

- a tensor becomes a `StoredTensor`, its place in the file; example: the float32 tensor of shape (2, 3) whose storage
  `data/0` begins at byte 512 becomes `StoredTensor(path, 512, (2, 3), torch.float32)`;
- an object of Megatron or torch (an enum, a function in an argument list) becomes an `Inert` record of its name;
- anything else is refused.

A shard of `torch.distributed.checkpoint` has many such archives one after the other, each a window of the file.

Format: torch/serialization.py and caffe2/serialize/inline_container.h of PyTorch 2.x.
"""

from __future__ import annotations

import builtins
import errno
import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.checkpoint.torchfile.unpickle import (
    MAX_PICKLE_BYTES,
    PLAIN_BUILTINS,
    BoundedUnpickler,
    modern_name,
    unpickling_errors_as_refused,
)
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.whole_io import DiskFile

_MAX_DIMENSIONS = 64  # of torch
_LEGACY_PICKLES = 5
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# Packages of the objects that checkpoints hold beside tensors (argument lists, enums); each becomes an `Inert`.
_STANDARD_PACKAGES = {"_codecs", "argparse", "collections", "enum", "functools", "pathlib", "signal", "types"}
_TRAINING_PACKAGES = {"apex", "lightning", "megatron", "nemo", "numpy", "torch", "transformer_engine"}
_KNOWN_PACKAGES = _STANDARD_PACKAGES | _TRAINING_PACKAGES


class Inert:
    """Stand-in for an object that is not built: the arguments and the state it was pickled with."""

    origin = ""

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        """Create the record."""
        record = super().__new__(cls)
        record.args = args
        return record

    def __init__(self, *_: Any, **__: Any) -> None:
        self.args: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an entry of a dictionary type."""

    def append(self, value: Any) -> None:
        """Ignore an entry of a list type."""

    def extend(self, values: Any) -> None:
        """Ignore entries of a list type."""

    def __repr__(self) -> str:
        return self.origin


def open_torch_file(path: Path, start: int = 0, length: int | None = None) -> Any:
    """Return what was saved, with a `StoredTensor` for each tensor and an `Inert` for each object of unknown type.

    Args:
        path: the file.
        start, length: the window of the file that is one `torch.save`, in bytes; by default the whole file.

    Raises:
        RefusedError: the file is damaged, has torch's format before 1.6, or its pickle needs more than tensors.
        OSError: the file cannot be read.
    """
    return _open(path, start, length, _TensorUnpickler)


def check_torch_file(path: Path) -> None:
    """Refuse a file whose pickle `open_torch_file` would refuse, except that its tensors may have any strides.

    Raises:
        RefusedError: as `open_torch_file`.
        OSError: the file cannot be read.
    """
    _open(path, 0, None, _Checker)


def check_legacy_torch_file(path: Path) -> None:
    """Refuse a file in torch's format before 1.6 that would build more than its bytes hold.

    Such a file is five pickles (a mark, the version, the machine, the content, the keys of the storages), then the
    bytes of all storages.

    Raises:
        RefusedError: it is damaged, builds too many values or too large storages, or needs more than tensors.
        OSError: the file cannot be read.
    """
    with DiskFile(path) as file:
        head, size = file.read_at(0, MAX_PICKLE_BYTES), file.size
    with unpickling_errors_as_refused(path):
        checker = _LegacyChecker(head, size)
        for _ in range(_LEGACY_PICKLES):
            checker.load()


def _open(path: Path, start: int, length: int | None, unpickler: type[_TensorUnpickler]) -> Any:
    length = path.stat().st_size - start if length is None else length
    try:
        with io.BufferedReader(_Window(path, start, length)) as file:
            with zipfile.ZipFile(file) as archive:
                records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            places = _ArchiveRecords(path, file, start, length, records)
            if "byteorder" in records and places.read("byteorder") != b"little":
                raise RefusedError(f"{path}: big-endian data is not supported; save it on a little-endian machine")
            content = places.read("data.pkl")
            with unpickling_errors_as_refused(path):
                return unpickler(content, places).load()
    except zipfile.BadZipFile as error:
        raise_disk_error(error.__context__)  # zipfile hides errors of the disk
        raise RefusedError(
            f"{path}: not a file of torch.save ({error}): damaged, or written before torch 1.6; load and save it again"
        ) from error
    except (KeyError, ValueError, NotImplementedError, struct.error, OSError) as error:
        raise_disk_error(error)
        raise RefusedError(f"{path}: damaged ({type(error).__name__}: {error}); copy it again") from error


def load_torch_file(path: Path, start: int = 0, length: int | None = None) -> Any:
    """Return what was saved, with its tensors in memory; see `open_torch_file`.

    Raises:
        RefusedError: also if the file holds objects of other types than plain values and tensors.
        OSError: the file cannot be read.
    """

    def load(value: Any) -> Any:
        if isinstance(value, StoredTensor):
            return value.read()
        if isinstance(value, Inert) or (isinstance(value, type) and issubclass(value, Inert)):
            raise RefusedError(f"{path}: refused: it holds {value.origin}, which no checkpoint needs; do not use it")
        if isinstance(value, dict):
            return type(value)((load(key), load(entry)) for key, entry in value.items())
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)(map(load, value))
        return value

    found = open_torch_file(path, start, length)
    with unpickling_errors_as_refused(path):  # a container that contains itself
        return load(found)


def raise_disk_error(error: BaseException | None) -> None:
    """Raise errors of the disk; EINVAL (an impossible position) is a fault of the file instead."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error


class _Window(io.RawIOBase):
    """Part of a file that reads like a whole file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file = DiskFile(path)
        self._start, self._length, self._at = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise ValueError("before the start")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._at))
        count = self._file.read_into_at(view[:wanted], self._start + self._at)
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class _ArchiveRecords:
    """Records of one zip archive: its pickle and its storages.

    They are not read through zipfile, which compares the CRC-32: a save may have omitted it.
    """

    path: Path
    file: IO[bytes]
    start: int
    length: int
    records: dict[str, zipfile.ZipInfo]

    def find(self, name: str) -> tuple[int, int]:
        """Return the position of a record's first byte in the archive, and its length."""
        info = self.records[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        self.file.seek(info.header_offset)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(self.file.read(_LOCAL_HEADER.size))
        if signature != b"PK\x03\x04":
            raise ValueError(f"no header for {name}")
        at = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if at + info.file_size > self.length:
            raise ValueError(f"{name} extends beyond the end of the file")
        return at, info.file_size

    def read(self, name: str) -> bytes:
        """Return the content of a record that is not a storage."""
        at, length = self.find(name)
        if length > MAX_PICKLE_BYTES:
            raise ValueError(f"{name} has {length} bytes, above the limit of {MAX_PICKLE_BYTES}")
        self.file.seek(at)
        return self.file.read(length)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    offset: int
    num_bytes: int

    def __setstate__(self, _: object) -> None:
        raise pickle.UnpicklingError("it wants to change the place of a storage")


class _TensorUnpickler(BoundedUnpickler):
    """Unpickler that builds stored tensors, plain values and inert records."""

    def __init__(self, data: bytes, places: _ArchiveRecords) -> None:
        super().__init__(data, encoding="utf-8")
        self._places = places

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage; `pid` is ("storage", type, key, device, number of elements)."""
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a storage of an unknown kind: {kind}")
        at, num_bytes = self._places.find(f"data/{key}")
        return _Storage(dtype, self._places.start + at, num_bytes)

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for a name in the pickle; only plain types stand for themselves."""
        module = modern_name(module)
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return self._tensor
        if module == "torch._utils" and name == "_rebuild_tensor_v3":  # dtypes without a storage class, such as FP8
            return lambda storage, offset, shape, stride, _grad, _hooks, dtype, *_: self._tensor(
                replace(storage, dtype=dtype), offset, shape, stride
            )
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "builtins" and name in PLAIN_BUILTINS:
            return getattr(builtins, name)
        if module.partition(".")[0] in _KNOWN_PACKAGES:
            return type(name, (Inert,), {"origin": f"{module}.{name}"})
        return super().find_class(module, name)

    def _tensor(
        self, storage: _Storage, offset: int, shape: Sequence[int], stride: Sequence[int], *_: Any
    ) -> StoredTensor:
        if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and size < 1 << 62 for size in (*shape, offset)):
            raise ValueError("a tensor without a valid shape")
        start = storage.offset + offset * storage.dtype.itemsize
        found = StoredTensor(self._places.path, start, tuple(shape), storage.dtype)
        step, numel = 1, math.prod(shape)
        for size, jump in zip(reversed(shape), reversed(stride), strict=True):
            if size > 1 and numel and jump != step:
                raise ValueError(f"a tensor of shape {tuple(shape)} is not contiguous")
            step *= size
        is_beyond_end = found.offset + found.num_bytes > storage.offset + storage.num_bytes
        if offset < 0 or min(shape, default=0) < 0 or is_beyond_end:
            raise ValueError(f"a tensor of shape {tuple(shape)} is larger than its bytes")
        return found


class _Checker(_TensorUnpickler):
    """Unpickler that builds no tensors."""

    def _tensor(self, *_: Any) -> Any:
        return None


class _LegacyChecker(_Checker):
    """Unpickler that builds no tensors and adds up the sizes of the storages."""

    def __init__(self, data: bytes, file_bytes: int) -> None:
        BoundedUnpickler.__init__(self, data, encoding="utf-8")
        self._remaining_bytes = file_bytes
        self._seen: set[str] = set()

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage; `pid` is ("storage", type, key, device, number of elements, part of another storage)."""
        kind, dtype, key, _, numel, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int:
            raise pickle.UnpicklingError(f"a storage of an unknown kind: {kind}")
        if key not in self._seen:  # torch builds a storage at its first mention
            self._seen.add(key)
            self._remaining_bytes -= abs(numel) * dtype.itemsize
        if self._remaining_bytes < 0:
            raise pickle.UnpicklingError("its tensors are larger than the file")
        return _Storage(dtype, 0, numel * dtype.itemsize)
