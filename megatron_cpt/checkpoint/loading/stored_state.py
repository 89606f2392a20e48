"""Contents of a checkpoint in torch's distributed format: its tensors by name, and the plain values beside them.

This package reads the format itself instead of calling `dist_checkpointing.load`. That function unpickles `.metadata`
without restriction (megatron-core 0.19 always, 0.16 in its reader), which would execute code from a checkpoint, and no
argument of it replaces the reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_cpt.checkpoint.record import read_json
from megatron_cpt.checkpoint.torchfile.torch_file import load_torch_file
from megatron_cpt.checkpoint.torchfile.unpickle import read_metadata
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import exists

_BACKEND_FILE = "metadata.json"
_COMMON_FILE = "common.pt"  # written by megatron-core up to 0.18
_COMMON_ENTRY = "common_state/shard_0_1"  # the same values in a shard, written by megatron-core 0.19


@dataclass(frozen=True)
class StoredBox:
    """Box of a tensor, stored in a shard as one `torch.save`.

    Attributes:
        offsets, sizes: position of the box in the tensor, and its shape.
        path: the shard.
        start, length: the part of the shard that holds the box, in bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class StoredState:
    """Contents of a checkpoint; the tensors are still in their files.

    Attributes:
        shapes: shape of every tensor over all ranks, by name.
        boxes: the boxes that make up each tensor, by name.
        common: values that are not sharded, such as the optimizer's parameter groups.
    """

    shapes: dict[str, tuple[int, ...]]
    boxes: dict[str, list[StoredBox]]
    common: dict[str, Any]


@contextlib.contextmanager
def read_errors_as_refused(checkpoint: Path) -> Iterator[None]:
    """Turn every error of a read into a refusal, which the ranks exchange; a rank that raises alone blocks them.

    Damaged bytes can make an unpickler raise anything, and a disk or a GPU may fail on one rank only.

    Raises:
        RefusedError: for any error except an error of the disk.
        OSError: the disk failed.
    """
    try:
        yield
    except RefusedError:
        raise
    except OSError as error:
        if not is_path_error(error):
            raise
        raise RefusedError(f"{checkpoint}: cannot be read: {error}") from error
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise RefusedError(f"{checkpoint}: cannot be read: {type(error).__name__}: {first_line}") from error


def read_stored_state(checkpoint: Path) -> StoredState:
    """Read everything of a checkpoint but its tensors.

    Raises:
        RefusedError: a file is missing, damaged or holds more than plain types.
        OSError: the disk failed.
    """
    with read_errors_as_refused(checkpoint):
        file = checkpoint / _BACKEND_FILE
        if read_json(file).get("sharded_backend") != "torch_dist":
            raise RefusedError(f"{file}: not of megatron-core's torch_dist format")
        metadata = read_metadata(checkpoint)
        entries = metadata.state_dict_metadata.items()
        tensors = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        return StoredState(
            shapes={name: tuple(entry.size) for name, entry in tensors.items()},
            boxes={name: _boxes(checkpoint, name, entry, metadata) for name, entry in tensors.items()},
            common=_read_common(checkpoint, metadata),
        )


def _boxes(checkpoint: Path, name: str, entry: TensorStorageMetadata, metadata: Metadata) -> list[StoredBox]:
    boxes = []
    for box in entry.chunks:
        place = metadata.storage_data[MetadataIndex(name, box.offsets)]
        if getattr(place, "transform_descriptors", None):
            raise RefusedError(f"{checkpoint}: {name} is stored with {place.transform_descriptors}; save it without")
        path = checkpoint / place.relative_path
        boxes.append(StoredBox(tuple(box.offsets), tuple(box.sizes), path, place.offset, place.length))
    return boxes


def _read_common(checkpoint: Path, metadata: Metadata) -> dict[str, Any]:
    if exists(checkpoint / _COMMON_FILE):
        common = load_torch_file(checkpoint / _COMMON_FILE)
    else:
        place = metadata.storage_data[MetadataIndex(_COMMON_ENTRY)]
        (common,) = load_torch_file(checkpoint / place.relative_path, place.offset, place.length)
    if not isinstance(common, dict):
        raise RefusedError(f"{checkpoint}: {_COMMON_FILE} holds a {type(common).__name__}, not values by name")
    return common
