"""No code from a checkpoint: what torch and megatron-core unpickle is held to plain types.

A checkpoint's `.metadata` is a pickle that `torch.distributed.checkpoint` loads as it is, and its byte entries go
through `torch.load(weights_only=False)`; a pickle may call any function. Checksums do not help against somebody who
can write checksums.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import types
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem

from megatron_cpt.errors import RefusedError

# Modules whose listed names a description of tensors is made of; all are plain data, none runs anything.
_ALLOWED = {
    "builtins": {
        "set",
        "frozenset",
        "slice",
        "bytearray",
        "complex",
        "int",
        "float",
        "str",
        "bool",
        "list",
        "dict",
        "tuple",
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"LoadPlan", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class PlainUnpickler(pickle.Unpickler):
    """Loads plain data and descriptions of tensors, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up in the list.

        Raises:
            UnpicklingError: the name is not on it.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _ALLOWED.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which no checkpoint needs")


def load_plain(file: IO[bytes]) -> Any:
    """`pickle.load` held to plain types."""
    return PlainUnpickler(file).load()


def _load_metadata(file: IO[bytes]) -> Any:
    """torch's description of a checkpoint, none of whose tensors may lie elsewhere.

    Raises:
        UnpicklingError: it holds more than plain types, or names a file outside of the folder.
    """
    metadata = load_plain(file)
    for entry in (getattr(metadata, "storage_data", None) or {}).values():
        name = str(entry.relative_path)
        if name != PurePosixPath(name).name:
            raise pickle.UnpicklingError(f"it wants to read {name}, which lies outside of its folder")
    return metadata


@contextlib.contextmanager
def plain_types_only(where: object) -> Iterator[None]:
    """Inside the block, torch's readers unpickle plain types only.

    Raises:
        RefusedError: naming `where`, when something else is asked for.
    """
    module: Any = filesystem
    real_pickle, real_load = module.pickle, torch.load
    module.pickle = types.SimpleNamespace(**{**vars(pickle), "load": _load_metadata})
    torch.load = _weights_only(real_load)
    try:
        yield
    except pickle.UnpicklingError as error:
        raise RefusedError(f"{where}: refused: {_first_line(error)}; do not use this checkpoint") from error
    finally:
        module.pickle = real_pickle
        torch.load = real_load


def _weights_only(load: Any) -> Any:
    @functools.wraps(load)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "weights_only": True})

    return wrapper


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
