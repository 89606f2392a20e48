"""Writer of megatron-core's torch_dist checkpoints, a file at a time and without process groups.

The result equals a checkpoint that `checkpoint/saving` makes of a model: Transformer Engine's names, all layers stacked
along a first dimension, pieces in `__N_M.distcp`. Pieces are cut at the boundaries of the target's tensor-parallel
ranks and files end with its pipeline stages, so every rank reads only its own part. Other layouts can load it too.

Each piece passes through memory once: it is read, hashed and written. Files are independent, so they are written in
parallel, and an interrupted import keeps finished files.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_cpt.checkpoint.saving.torch_save import HashedStream, save_tensor
from megatron_cpt.checkpoint.torchfile.unpickle import METADATA_FILE
from megatron_cpt.convert.mapping.names import stored_name
from megatron_cpt.convert.megatron.torch_dist_plan import FilePlan, TensorSpec, column_cuts, row_cuts
from megatron_cpt.convert.megatron.torch_dist_reader import COMMON_FILE
from megatron_cpt.files.whole_io import DiskFile, write_content

# Modules with FP8 state in Transformer Engine. A converted model has none, but megatron-core expects the entries.
_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)

ReadRows = Callable[[str, int, int], torch.Tensor]
"""read(name, first, last) returns rows [first, last) of a global tensor, in the dtype to write."""


@dataclass(frozen=True)
class FileEntry:
    """Piece of a tensor in a file.

    Attributes:
        key: name in the checkpoint.
        offsets, sizes: box of the piece in the stored tensor; None for an entry that is not a tensor.
        position, length: bytes of the piece in the file.
    """

    key: str
    offsets: list[int] | None
    sizes: list[int] | None
    position: int
    length: int


@dataclass(frozen=True)
class WrittenFile:
    """Size, checksum and pieces of a written file, for the journal and the manifest."""

    size: int
    checksum: str
    entries: list[FileEntry]


def write_file(
    path: Path,
    plan: FilePlan,
    specs: Mapping[str, TensorSpec],
    tensor_parallel: int,
    read: ReadRows,
    advance: Callable[[int], None],
) -> WrittenFile:
    """Write one file of the checkpoint and wait until it is on the disk.

    Args:
        specs: all tensors of the model.
        advance: called with the number of bytes of every piece.

    Raises:
        OSError: the disk is full, a limit is reached, or the like.
    """
    entries = []
    with DiskFile(path, "wb") as file:
        out = HashedStream(file)
        for name in plan.tensors:
            key, layer = stored_name(name)
            for offsets, piece in _pieces(name, specs[name], tensor_parallel, read):
                sizes = list(piece.shape)
                if layer is not None:
                    offsets, sizes, piece = [layer, *offsets], [1, *sizes], piece[None]
                position = out.tell()
                save_tensor(piece, out)
                entries.append(FileEntry(key, offsets, sizes, position, out.tell() - position))
                advance(piece.nbytes)
        out.flush()
        file.sync()
    return WrittenFile(out.tell(), out.checksum(), entries)


def extra_state_keys(num_layers: int) -> list[str]:
    """Return the keys of the FP8 state that megatron-core expects besides the tensors."""
    layers = range(num_layers)
    return [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
        for layer in layers
        for module in _EXTRA_STATES
    ]


def write_extra_states(path: Path, keys: Sequence[str]) -> WrittenFile:
    """Write empty entries of FP8 state, see `extra_state_keys`."""
    empty = io.BytesIO()
    torch.save([None], empty)
    entries = []
    with DiskFile(path, "wb") as file:
        out = HashedStream(file)
        for key in keys:
            entries.append(FileEntry(key, None, None, out.tell(), empty.tell()))
            out.write(empty.getbuffer())
        out.flush()
        file.sync()
    return WrittenFile(out.tell(), out.checksum(), entries)


def write_metadata(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    num_layers: int,
    files: Mapping[str, WrittenFile],
    common: Mapping[str, Any],
) -> list[str]:
    """Write `.metadata`, `metadata.json` and `common.pt`, which megatron-core reads first; return these names.

    Args:
        common: values that are not sharded, such as the optimizer's parameter groups.
    """
    _write_tensor_index(folder, specs, num_layers, files)
    return [METADATA_FILE, *write_common(folder, common)]


def write_common(folder: Path, common: Mapping[str, Any]) -> list[str]:
    """Write `metadata.json` and `common.pt`, which every version of megatron-core reads; return these names."""
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    write_content(folder / "metadata.json", orjson.dumps(backends | versions))
    content = io.BytesIO()
    torch.save(dict(common), content)  # to a path, its errors would have no number
    write_content(folder / COMMON_FILE, content.getvalue())
    return ["metadata.json", COMMON_FILE]


def _write_tensor_index(
    folder: Path, specs: Mapping[str, TensorSpec], num_layers: int, files: Mapping[str, WrittenFile]
) -> None:
    described: dict[str, Any] = {}
    places, shapes = {}, {}
    for name, spec in specs.items():
        key, layer = stored_name(name)
        shapes[key] = (spec.shape if layer is None else (num_layers, *spec.shape), spec.dtype)
    # Sorted and interned, an import that was interrupted has the bytes of one that was not: a pickle depends on the
    # order, and on which equal strings are the same object.
    for file, written in sorted(files.items()):
        for entry in written.entries:
            key, info = sys.intern(entry.key), _StorageInfo(sys.intern(file), entry.position, entry.length)
            if entry.offsets is None or entry.sizes is None:
                described[key] = BytesStorageMetadata()
                places[MetadataIndex(key)] = info
                continue
            shape, dtype = shapes[key]
            tensor = described.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            )
            offsets = torch.Size(entry.offsets)
            places[MetadataIndex(key, offsets, len(tensor.chunks))] = info
            tensor.chunks.append(ChunkStorageMetadata(offsets, torch.Size(entry.sizes)))
    write_content(folder / METADATA_FILE, pickle.dumps(Metadata(described, None, places)))


def _pieces(
    name: str, spec: TensorSpec, tensor_parallel: int, read: ReadRows
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the pieces of a tensor with their offsets."""
    columns = column_cuts(name, spec, tensor_parallel)
    for first, last in pairwise(row_cuts(name, spec, tensor_parallel)):
        rows = read(name, first, last)
        assert tuple(rows.shape) == (last - first, *spec.shape[1:]), f"{name}: {tuple(rows.shape)}"
        assert rows.dtype == spec.dtype, f"{name}: {rows.dtype}"
        for left, right in pairwise(columns):
            piece = rows[:, left:right] if len(spec.shape) > 1 else rows
            yield [first, left][: len(spec.shape)], piece
