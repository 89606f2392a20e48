"""Writes tensors as a torch_dist checkpoint of megatron-core, a file at a time and without process groups.

What comes out is what `checkpoint/saving/saver.py` makes of a model: the names of Transformer Engine's spec, all
layers stacked
along a first dimension, pieces in `__N_M.distcp`. Pieces are cut where the target's tensor-parallel ranks are cut,
files end where its pipeline stages end: every rank reads its own part and nothing else; other layouts can load it too.

Every piece goes through memory once: read, hashed, written. Files are independent of each other, so they are written in
parallel, and a finished one need not be written again.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
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
from megatron_cpt.convert.job import named
from megatron_cpt.convert.mapping.tensors import stored_name
from megatron_cpt.convert.megatron.torch_dist_plan import FilePlan, Form, column_cuts, row_cuts
from megatron_cpt.files.atomic import close_durably

# Transformer Engine's FP8 state; a converted model has none, but megatron-core asks for the entries.
_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)

ReadRows = Callable[[str, int, int], torch.Tensor]
"""read(name, first, last): rows of a global tensor, in its final type."""


@dataclass(frozen=True)
class FileEntry:
    """A piece in a file.

    Attributes:
        key: megatron-core's name.
        offsets, sizes: of the piece in the stored tensor; None for an entry that is no tensor.
        position, length: of its bytes in the file.
    """

    key: str
    offsets: list[int] | None
    sizes: list[int] | None
    position: int
    length: int


@dataclass(frozen=True)
class WrittenFile:
    """What was written, as the journal and the manifest want it."""

    size: int
    checksum: str
    entries: list[FileEntry]


def write_file(
    path: Path,
    plan: FilePlan,
    forms: Mapping[str, Form],
    *,
    num_layers: int,
    tensor_parallel: int,
    read: ReadRows,
    advance: Callable[[int], None],
) -> WrittenFile:
    """Write one file of the checkpoint and make it durable.

    Args:
        path: where.
        plan: what.
        forms: the model's tensors.
        num_layers: of the model.
        tensor_parallel: of the target.
        read: gives the rows.
        advance: told of every piece's bytes.

    Raises:
        OSError: the disk is full, a limit is reached, and the like.
    """
    entries = []
    with named(path), open(path, "wb", buffering=0) as file:
        out = HashedStream(file)
        for name in plan.tensors:
            key, layer = stored_name(name)
            for offsets, piece in _pieces(name, forms[name], tensor_parallel, read):
                sizes = list(piece.shape)
                if layer is not None:
                    offsets, sizes, piece = [layer, *offsets], [1, *sizes], piece[None]
                position = out.tell()
                save_tensor(piece, out)
                entries.append(FileEntry(key, offsets, sizes, position, out.tell() - position))
                advance(piece.nbytes)
        out.flush()
        close_durably(file)
    return WrittenFile(out.tell(), out.checksum(), entries)


def write_extra_states(path: Path, num_layers: int) -> WrittenFile:
    """The empty entries that megatron-core asks for besides the tensors."""
    empty = io.BytesIO()
    torch.save([None], empty)
    entries = []
    with open(path, "wb", buffering=0) as file:
        out = HashedStream(file)
        for layer in range(num_layers):
            for module in _EXTRA_STATES:
                key = f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
                entries.append(FileEntry(key, None, None, out.tell(), empty.tell()))
                out.write(empty.getbuffer())
        out.flush()
        close_durably(file)
    return WrittenFile(out.tell(), out.checksum(), entries)


def write_metadata(
    folder: Path, forms: Mapping[str, Form], num_layers: int, files: Mapping[str, WrittenFile]
) -> list[str]:
    """Write `.metadata`, `metadata.json` and `common.pt`: what megatron-core looks at first.

    Returns:
        The names of these files.
    """
    _write_tensor_index(folder, forms, num_layers, files)
    (folder / "metadata.json").write_bytes(
        orjson.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        )
    )
    torch.save({}, folder / "common.pt")
    return [".metadata", "metadata.json", "common.pt"]


def _write_tensor_index(
    folder: Path, forms: Mapping[str, Form], num_layers: int, files: Mapping[str, WrittenFile]
) -> None:
    described: dict[str, Any] = {}
    places = {}
    shapes = {}
    for name, form in forms.items():
        key, layer = stored_name(name)
        shapes[key] = (form.shape if layer is None else (num_layers, *form.shape), form.dtype)
    for file, written in files.items():
        for entry in written.entries:
            info = _StorageInfo(file, entry.position, entry.length)
            if entry.offsets is None or entry.sizes is None:
                described[entry.key] = BytesStorageMetadata()
                places[MetadataIndex(entry.key)] = info
                continue
            shape, dtype = shapes[entry.key]
            tensor = described.setdefault(
                entry.key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            )
            offsets = torch.Size(entry.offsets)
            places[MetadataIndex(entry.key, offsets, len(tensor.chunks))] = info
            tensor.chunks.append(ChunkStorageMetadata(offsets, torch.Size(entry.sizes)))
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, None, places)))


def _pieces(name: str, form: Form, tensor_parallel: int, read: ReadRows) -> Iterator[tuple[list[int], torch.Tensor]]:
    """A tensor's pieces with their offsets."""
    columns = column_cuts(name, form, tensor_parallel)
    cuts = row_cuts(name, form, tensor_parallel)
    for first, last in pairwise(cuts):
        rows = read(name, first, last)
        assert tuple(rows.shape) == (last - first, *form.shape[1:]), f"{name}: {tuple(rows.shape)}"
        assert rows.dtype == form.dtype, f"{name}: {rows.dtype}"
        for left, right in pairwise(columns):
            piece = rows[:, left:right] if len(form.shape) > 1 else rows
            yield [first, left][: len(form.shape)], piece


def written_from_journal(line: Mapping[str, Any]) -> WrittenFile:
    """A file's record as the journal keeps it."""
    return WrittenFile(line["size"], line["checksum"], [FileEntry(**entry) for entry in line["entries"]])
