"""Unpickling of a checkpoint's description, restricted to plain types.

A checkpoint's `.metadata` is a pickle, and a pickle may call any function. Checksums give no protection: whoever can
replace `.metadata` can also replace the checksums. So only the names listed here are ever looked up.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch

from megatron_cpt.errors import RefusedError
from megatron_cpt.files.whole_io import open_reader

METADATA_FILE = ".metadata"

_PLAIN_TYPES = (set, frozenset, slice, bytearray, complex, int, float, str, bool, list, dict, tuple)
PLAIN_BUILTINS = frozenset(kind.__name__ for kind in _PLAIN_TYPES)

_DESCRIPTION = "torch.distributed.checkpoint"
_CHUNK_CLASSES = {"BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "TensorStorageMetadata"}
# Names that torch's description of tensors consists of, by module; all are plain data, none executes anything.
_ALLOWED = {
    "builtins": PLAIN_BUILTINS,
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    f"{_DESCRIPTION}.metadata": _CHUNK_CLASSES | {"Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    f"{_DESCRIPTION}.filesystem": {"_StorageInfo"},
    f"{_DESCRIPTION}.planner": {"LoadPlan", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class PlainUnpickler(pickle.Unpickler):
    """Unpickler for plain data and descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that a pickle names; an UnpicklingError if the name is not in the list."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _ALLOWED.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which no checkpoint needs")


def load_plain(file: IO[bytes]) -> Any:
    """Load a pickle that holds plain types only; like `pickle.load`, but safe."""
    return PlainUnpickler(file).load()


def read_metadata(checkpoint: Path) -> Any:
    """Return torch's description of a checkpoint, a `torch.distributed.checkpoint.metadata.Metadata`.

    Raises:
        RefusedError: it holds more than plain types, or names a file outside of the folder.
    """
    path = checkpoint / METADATA_FILE
    with open_reader(path) as file:
        try:
            metadata = load_plain(file)
        except pickle.UnpicklingError as error:
            raise RefusedError(f"{path}: refused: {error}; do not use this checkpoint") from error
    for place in metadata.storage_data.values():
        name = str(place.relative_path)
        if name != PurePosixPath(name).name:
            raise RefusedError(f"{path}: refused: it names {name}, which lies outside of the checkpoint's folder")
    return metadata
