"""Unpickling of a checkpoint's description, restricted to plain types and bounded in memory and time.

A checkpoint's `.metadata` is a pickle, and a pickle may call any function. Checksums give no protection: whoever can
replace `.metadata` can also replace the checksums. So only the names listed here are ever looked up, and what a few
bytes may build is limited. Example: `bytearray(10**10)` takes 20 bytes of pickle and 10 GB of memory.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron_cpt.errors import RefusedError
from megatron_cpt.files.whole_io import open_reader

METADATA_FILE = ".metadata"

MAX_PICKLE_BYTES = 64 << 20  # the description of 400,000 pieces of tensors
_MAX_VALUES = 6_000_000  # containers and objects; an empty set, the largest, takes 216 bytes
_MAX_DEPTH = 100  # of tuples: Python computes the hash of a tuple by recursion without a limit
_MAX_DIMENSIONS = 16

_CALLABLE_TYPES = (set, frozenset, slice, bytearray, complex)
_PLAIN_TYPES = (*_CALLABLE_TYPES, int, float, str, bool, list, dict, tuple)
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


_PythonUnpickler: Any = pickle._Unpickler  # typeshed omits most of its methods


def modern_name(module: str) -> str:
    """Return the name of a module in Python 3; pickles of protocol 2, which torch writes, name `__builtin__`."""
    return "builtins" if module == "__builtin__" else module


class BoundedUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Unpickler that bounds what a pickle builds; a subclass decides in `find_class` what it may name.

    Python's own implementation, not the one in C: that one reserves memory for any length or memo index in the file,
    and calls cannot be counted.
    """

    def __init__(self, data: bytes, *, encoding: str = "ASCII") -> None:
        if len(data) > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"its {len(data)} bytes of pickle are above the limit of {MAX_PICKLE_BYTES}")
        super().__init__(io.BytesIO(data), encoding=encoding)
        self._remaining = _MAX_VALUES
        self._depths: dict[int, tuple[int, tuple[Any, ...]]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every name."""
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which no checkpoint needs")

    def _charge(self, values: int) -> None:
        self._remaining -= values
        if self._remaining < 0:
            raise pickle.UnpicklingError(f"it builds more than {_MAX_VALUES:,} values")

    def _check_call(self, function: Any, *arguments: Any) -> None:
        """Charge a call for the values that it may copy; refuse calls whose cost does not follow from their size."""
        self._charge(1 + sum(len(value) for value in arguments if hasattr(value, "__len__")))
        is_sized = function is bytearray and any(isinstance(value, int) for value in arguments)
        if is_sized or (function in _PLAIN_TYPES and function not in _CALLABLE_TYPES):
            raise pickle.UnpicklingError(f"it wants to call {function.__name__}, which no checkpoint needs")

    def _load_container(self) -> None:
        self._charge(1)

    def _load_reduce(self) -> None:
        self._check_call(self.stack[-2], *self.stack[-1])
        super().load_reduce()

    def _load_newobj(self) -> None:
        self._check_call(self.stack[-2], *self.stack[-1])
        super().load_newobj()

    def _load_build(self) -> None:
        state, holder = self.stack[-1], self.stack[-2]
        if isinstance(holder, type) or (callable(holder) and not hasattr(type(holder), "__setstate__")):
            raise pickle.UnpicklingError("it wants to change a class or a function")
        if isinstance(state, tuple) and not hasattr(holder, "__setstate__"):
            raise pickle.UnpicklingError("it holds an object with slots, which no checkpoint needs")
        self._check_call(None, state)
        super().load_build()

    def _load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(length, MAX_PICKLE_BYTES))))

    def _note_depth(self) -> None:
        """Refuse the tuple on the stack if tuples in it are nested too deeply."""
        made = self.stack[-1]
        depth = 1 + max((self._depths.get(id(item), (0,))[0] for item in made if type(item) is tuple), default=-1)
        if depth > _MAX_DEPTH:
            raise pickle.UnpicklingError(f"it nests tuples more than {_MAX_DEPTH} levels deep")
        if depth:
            self._depths[id(made)] = (depth, made)  # the tuple stays alive, so no other gets its id

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it uses an instruction that no checkpoint needs")


def _both(before: Any, after: Any) -> Any:
    def load(unpickler: Any) -> None:
        before(unpickler)
        after(unpickler)

    return load


def _dispatch() -> dict[int, Any]:
    table: dict[int, Any] = dict(_PythonUnpickler.dispatch)
    unpickler = BoundedUnpickler
    for code in (pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.LIST, pickle.DICT, pickle.MARK):
        table[code[0]] = _both(unpickler._load_container, table[code[0]])
    for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        table[code[0]] = _both(table[code[0]], unpickler._note_depth)
    refused = (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER)
    table |= {code[0]: unpickler._refuse for code in refused}
    table[pickle.REDUCE[0]] = unpickler._load_reduce
    table[pickle.NEWOBJ[0]] = unpickler._load_newobj
    table[pickle.BUILD[0]] = unpickler._load_build
    table[pickle.BYTEARRAY8[0]] = unpickler._load_bytearray8
    return table


BoundedUnpickler.dispatch = _dispatch()


class PlainUnpickler(BoundedUnpickler):
    """Unpickler for plain data and descriptions of tensors."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that a pickle names; an UnpicklingError if the name is not in the list."""
        module = modern_name(module)
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in _ALLOWED.get(module, ()) or is_dtype:
            return _PythonUnpickler.find_class(self, module, name)
        return super().find_class(module, name)


@contextlib.contextmanager
def unpickling_errors_as_refused(path: Path) -> Iterator[None]:
    """Turn every error of an unpickler into a refusal: damaged bytes can make it raise anything.

    Raises:
        RefusedError: for any error.
    """
    try:
        yield
    except RefusedError:
        raise
    except pickle.UnpicklingError as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise RefusedError(f"{path}: refused: {reason}; do not use this file") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RefusedError(f"{path}: damaged ({reason}); copy it again") from error


def read_metadata(checkpoint: Path) -> Metadata:
    """Return torch's description of a checkpoint; every value in it has the type that the class declares.

    Raises:
        RefusedError: it is damaged, holds more than plain types, or names a file outside of the folder.
    """
    path = checkpoint / METADATA_FILE
    with open_reader(path) as file:
        data = file.read(MAX_PICKLE_BYTES + 1)
    with unpickling_errors_as_refused(path):
        metadata = PlainUnpickler(data).load()
        _check(metadata)
    for place in metadata.storage_data.values():
        name = place.relative_path
        if name != PurePosixPath(name).name:
            raise RefusedError(f"{path}: refused: it names {name}, which lies outside of the checkpoint's folder")
    return cast(Metadata, metadata)


def _check(metadata: Any) -> None:
    """Raise a TypeError or ValueError if a part of a description has another type than its class declares."""
    _require(metadata, Metadata)
    for name, entry in _require(metadata.state_dict_metadata, dict).items():
        _require(name, str)
        if isinstance(entry, TensorStorageMetadata):
            _check_sizes(entry.size)
            _require(entry.properties.dtype, torch.dtype)
            for chunk in _require(entry.chunks, list):
                _require(chunk, ChunkStorageMetadata)
                if not len(_check_sizes(chunk.offsets)) == len(_check_sizes(chunk.sizes)) == len(entry.size):
                    raise ValueError(f"a piece of {name} has another number of dimensions")
    for index, place in _require(metadata.storage_data, dict).items():
        _require(_require(index, MetadataIndex).fqn, str)
        if index.offset is not None:
            _check_sizes(index.offset)
        _require(place.relative_path, str)
        _check_sizes((place.offset, place.length))


def _require(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _check_sizes(sizes: Any) -> Any:
    is_valid = isinstance(sizes, tuple) and len(sizes) <= _MAX_DIMENSIONS
    if not is_valid or not all(type(size) is int and 0 <= size < 2**62 for size in sizes):
        raise ValueError("sizes or offsets that are not whole numbers")
    return sizes
