"""Reading and comparing checkpoints without a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

if TYPE_CHECKING:
    from megatron_cpt.checkpoint.record import Record


def save_checkpoint(folder: Path, step: int, chunks: Sequence[Any], optimizer: Any, record: Record) -> Path:
    """Save one checkpoint, wait for its publication and return it; a collective call."""
    from megatron_cpt.checkpoint.saving.saver import Saver

    saver = Saver(folder, chunks, optimizer)
    try:
        path = saver.save(step, record)
    finally:
        saver.close()
    assert path is not None
    return path


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by name, over all ranks that saved it."""
    reader = dcp.FileSystemReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it reads in one process, as intended
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def differing(first: Path, second: Path, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """Return the names of tensors that differ in any bit between two checkpoints, or are in one only."""
    a, b = read_tensors(first), read_tensors(second)
    return sorted(
        name
        for name in {**a, **b}
        if not name.startswith(ignore)
        and (name not in a or name not in b or not torch.equal(_bits(a[name]), _bits(b[name])))
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
