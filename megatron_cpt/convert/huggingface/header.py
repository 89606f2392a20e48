"""Header of a safetensors file, checked completely before any of it is used.

The safetensors package checks headers too, but its errors name no tensor, it gives no byte ranges, and it reads through
a memory map, whose pages count as memory of this process.

Format (https://github.com/huggingface/safetensors, README, "Format"): 8 bytes with the length of the header, little
endian; the header, a JSON object; the data of all tensors without gaps. Example of a header:

    {"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
"""

from __future__ import annotations

import math
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.convert.huggingface.untrusted_json import parse_json_object
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.whole_io import DiskFile

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors package
_MAX_DIMENSIONS = 64  # of torch


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and place of a tensor.

    Attributes:
        file: the shard, with symbolic links resolved.
        start: offset of the first byte in the file; 0 in a pickled shard.
        stop: offset after the last byte.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return self.stop - self.start

    @property
    def num_rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, in the order of their data.

    Raises:
        RefusedError: the header is malformed, or does not describe exactly the bytes that follow it.
    """
    size = file.stat().st_size
    prefix = bytearray(8)
    if size < 8:
        raise RefusedError(f"{file}: {size} bytes, too short for a safetensors file; is the download complete?")
    pread_into(file, 0, memoryview(prefix), "its header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise RefusedError(f"{file}: says its header has {length} bytes, of a file of {size}; not a safetensors file?")
    text = bytearray(length)
    pread_into(file, 8, memoryview(text), "its header")
    header = parse_json_object(bytes(text), f"{file}: its header")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_no_gaps(file, tensors, 8 + length, size)
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def refuse(problem: str) -> RefusedError:
        return RefusedError(f"{file}: {name}: {problem}; do not use this file")

    if not isinstance(entry, dict):
        raise refuse("its entry in the header is not an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"dtype {dtype!r}; known are {', '.join(DTYPES)}")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _are_natural_numbers(shape, _MAX_DIMENSIONS):
        raise refuse(f"shape {reprlib.repr(shape)}, which must be a list of at most {_MAX_DIMENSIONS} whole numbers")
    if not _are_natural_numbers(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {reprlib.repr(offsets)}, which must be a start and an end")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise refuse(f"{offsets[1] - offsets[0]} bytes, but {dtype} {shape} takes {needed}")
    return TensorInfo(tuple(shape), DTYPES[dtype], file, data_start + offsets[0], data_start + offsets[1])


def _are_natural_numbers(values: Any, most: int) -> bool:
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(value) is int and value >= 0 for value in values)


def _check_no_gaps(file: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    end, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            kind = "overlaps" if info.start < end else "leaves a gap after"
            raise RefusedError(f"{file}: {name} {kind} {previous}; do not use this file")
        if info.stop > size:
            raise RefusedError(f"{file}: {name} ends at byte {info.stop} of {size}: the file is cut off; copy it again")
        end, previous = info.stop, name
    if end != size:
        raise RefusedError(f"{file}: {size - end} bytes after {previous} belong to no tensor; do not use this file")


def pread_into(file: Path, offset: int, view: memoryview, what: str) -> None:
    """Fill `view` from a file, without a memory map; `what` names the bytes in messages.

    Raises:
        RefusedError: the file ends too early.
    """
    with DiskFile(file) as opened:
        if opened.read_into_at(view, offset) < view.nbytes:
            raise RefusedError(f"{file}: ends inside {what}: it was cut off after it was opened; copy it again")
