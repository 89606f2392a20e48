"""The header of a safetensors file, believed in nothing.

The safetensors package checks it too, but names no tensor in its errors, gives no byte ranges and reads through a
memory map, whose pages count as this process's memory.

Format: 8 bytes little-endian length of the header; the header, JSON: name -> {dtype, shape, data_offsets}; the data,
without holes (https://github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.convert.job import named
from megatron_cpt.errors import RefusedError

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
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors package
_MAX_PLAIN_JSON = 64_000_000  # config.json and the index; a 1,000-layer model's index is under 2 MB


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is.

    Attributes:
        shape: its dimensions.
        dtype: its type.
        file: the shard, symbolic links resolved.
        start: offset of its first byte in the file; 0 in a pickled shard.
        stop: offset after its last byte.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return self.stop - self.start


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        RefusedError: the header is malformed, or does not describe the bytes behind it exactly.
    """
    size = file.stat().st_size
    prefix = bytearray(8)
    if size < 8:
        raise RefusedError(f"{file}: {size} bytes, too short for a safetensors file")
    pread_into(file, 0, memoryview(prefix), "its header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, _MAX_HEADER):
        raise RefusedError(f"{file}: says its header has {length} bytes, of a file of {size}; not a safetensors file?")
    text = bytearray(length)
    pread_into(file, 8, memoryview(text), "its header")
    header = parse_object(bytes(text), f"{file}: its header")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_cover(file, tensors, 8 + length, size)
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def _tensor_info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    def refuse(what: str) -> RefusedError:
        return RefusedError(f"{file}: {name}: {what}")

    if not isinstance(entry, dict):
        raise refuse("its entry in the header is not an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"dtype {dtype!r}; known are {', '.join(DTYPES)}")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _are_counts(shape):
        raise refuse(f"shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {offsets!r}")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise refuse(f"{offsets[1] - offsets[0]} bytes, but {dtype} {shape} takes {needed}")
    return TensorInfo(tuple(shape), DTYPES[dtype], file, base + offsets[0], base + offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(file: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    """The tensors lie side by side and end with the file."""
    end, last = base, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            kind = "overlaps" if info.start < end else "leaves a hole behind"
            raise RefusedError(f"{file}: {name} {kind} {last}")
        if info.stop > size:
            raise RefusedError(f"{file}: {name} ends at byte {info.stop} of {size}: the file is cut off")
        end, last = info.stop, name
    if end != size:
        raise RefusedError(f"{file}: {size - end} bytes behind {last} belong to no tensor")


def pread_into(file: Path, offset: int, view: memoryview, what: str) -> None:
    """Fill `view` from the file, without a map; `what` names it in a `RefusedError` where the file ends before."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < view.nbytes:
            with named(file):
                count = os.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                raise RefusedError(f"{file}: ends inside {what}: it was cut off after it was opened")
            done += count
    finally:
        os.close(fd)


def read_json_object(file: Path) -> dict[str, Any]:
    """A file with one JSON object and no key twice.

    Raises:
        RefusedError: it is missing, too large, or something else.
    """
    try:
        size = file.stat().st_size
        text = file.read_bytes() if size <= _MAX_PLAIN_JSON else b""
    except OSError as error:
        raise RefusedError(f"{file}: cannot be read: {error.strerror}") from error
    if size > _MAX_PLAIN_JSON:
        raise RefusedError(f"{file}: {size} bytes of JSON; refused above {_MAX_PLAIN_JSON}")
    return parse_object(text, str(file))


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """One JSON object and no key twice; `what` names it in a `RefusedError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise RefusedError(f"{what}: has {name} twice")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{what}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RefusedError(f"{what}: not a JSON object")
    return value
