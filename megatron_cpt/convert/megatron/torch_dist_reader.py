"""Checkpoints of megatron-core's `dist_checkpointing` (torch_dist): ours, Megatron-LM's, Megatron-Bridge's, NeMo 2's.

Read without process groups, a tensor or some of its rows at a time, straight from their place in the files. Layers may
be stored one by one or stacked along a first dimension, under any prefix (`model.`, `module.`), with the names of
either layer spec, in pieces of any TP x PP.

Format: torch/distributed/checkpoint/{metadata,filesystem}.py of PyTorch 2.x, megatron/core/dist_checkpointing.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.checkpoint.torchfile.torch_file import open_torch_file
from megatron_cpt.checkpoint.torchfile.unpickle import load_plain
from megatron_cpt.convert.job import named
from megatron_cpt.convert.mapping.resolve import local_name
from megatron_cpt.convert.mapping.tensors import EMBEDDING, Mosaic, MosaicWeights, Piece
from megatron_cpt.errors import RefusedError

logger = logging.getLogger(__name__)

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
_SKIPPED = re.compile(r"(chained_\d+\.)?(optimizer|optim)\.|rng|rerun_state|opt_param_scheduler")
_FP8_STATE = ("_extra_state", ".amax_history")  # Transformer Engine's pickle, and the tensors that we keep in its place
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")


BeforeRead = Callable[[Path], None]


def take_as_it_is(_: Path) -> None:
    """For checkpoints without checksums."""


class TorchDistWeights(MosaicWeights):
    """The weights of such a checkpoint.

    Attributes:
        folder: where its files lie.
        tensors: by the local layer spec's names, one for each layer.

    Raises:
        RefusedError: it is damaged, incomplete or no GPT model.
    """

    def __init__(self, path: Path, before_read: BeforeRead = take_as_it_is) -> None:
        """Read the description of all tensors; no weights.

        Args:
            path: the folder, or one above it.
            before_read: called with a file before anything of it is read, any number of times and from any thread.
        """
        self.folder = find_torch_dist(path) or path
        path = self.folder / METADATA_FILE
        try:
            with open(path, "rb") as file:
                metadata = load_plain(file)
            super().__init__(_collect(self.folder, metadata, before_read))
        except FileNotFoundError as error:
            raise RefusedError(f"{path}: missing; this is no torch_dist checkpoint") from error
        except pickle.UnpicklingError as error:
            raise RefusedError(f"{path}: refused: {error}; do not use this checkpoint") from error
        except (AttributeError, EOFError, ValueError, TypeError, LookupError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RefusedError(f"{path}: damaged ({reason}); copy the checkpoint again") from error

    def common(self) -> Mapping[str, Any]:
        """What lies beside the tensors (`args` of Megatron-LM); empty where there is nothing."""
        path = self.folder / COMMON_FILE
        found = open_torch_file(path) if path.is_file() else {}
        return found if isinstance(found, dict) else {}


def find_torch_dist(path: Path) -> Path | None:
    """The folder with `.metadata`: the one named, its newest `iter_*`, or `weights/` in one of them."""
    for folder in (path, newest_iteration(path)):
        for candidate in (folder, folder / "weights", folder / "model_weights") if folder is not None else ():
            if (candidate / METADATA_FILE).is_file():
                return candidate
    return None


def newest_iteration(path: Path) -> Path | None:
    """The `iter_0001000` or `release` that `latest_checkpointed_iteration.txt` names, else the last one there."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        name = tracker.read_text(encoding="utf-8").strip()
        folder = path / (f"iter_{int(name):07d}" if name.isdigit() else "release")
        if folder.is_dir():
            return folder
    found = sorted(folder for folder in path.glob("iter_*") if folder.is_dir())
    return found[-1] if found else None


def _collect(folder: Path, metadata: Any, before_read: BeforeRead) -> dict[str, Mosaic]:
    """Every tensor of the model, stacked layers taken apart."""
    places = _places(folder, metadata)
    stored = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks") and not _SKIPPED.match(key) and not any(part in key for part in _FP8_STATE)
    }
    prefix = _prefix(folder, stored)
    tensors: dict[str, Mosaic] = {}
    for key, entry in stored.items():
        if not key.startswith(prefix):
            logger.warning("%s: %s is not part of the model and left out", folder, key)
            continue
        shape, dtype = tuple(entry.size), entry.properties.dtype
        pieces = [_piece(folder, key, chunk, places, before_read) for chunk in entry.chunks]
        name = local_name(key[len(prefix) :])
        for single, mosaic in _unstack(name, shape, dtype, pieces):
            if single in tensors:
                raise RefusedError(f"{folder}: two tensors are {single}")
            tensors[single] = mosaic
    return tensors


def _prefix(folder: Path, keys: Mapping[str, Any]) -> str:
    found = sorted({key[: -len(EMBEDDING)] for key in keys if key == EMBEDDING or key.endswith(f".{EMBEDDING}")})
    if len(found) != 1:
        what = "no" if not found else f"{len(found)} ({', '.join(found)})"
        raise RefusedError(f"{folder}: {what} {EMBEDDING}; this is no checkpoint of one GPT model of megatron-core")
    return found[0]


def _places(folder: Path, metadata: Any) -> dict[tuple[str, tuple[int, ...]], Any]:
    places = {}
    for index, info in metadata.storage_data.items():
        if index.offset is None:
            continue  # a byte entry
        name = PurePosixPath(info.relative_path)
        if name.is_absolute() or ".." in name.parts:
            raise RefusedError(f"{folder}: {METADATA_FILE} names {info.relative_path}, which is outside of the folder")
        places[index.fqn, tuple(index.offset)] = info
    return places


def _piece(
    folder: Path, key: str, chunk: Any, places: Mapping[tuple[str, tuple[int, ...]], Any], before_read: BeforeRead
) -> Piece:
    info = places.get((key, tuple(chunk.offsets)))
    if info is None:
        raise RefusedError(f"{folder}: {key}: no file holds its piece at {tuple(chunk.offsets)}")
    if getattr(info, "transform_descriptors", None):
        raise RefusedError(f"{folder}: {key}: stored with {info.transform_descriptors}; save it without")
    path = folder / info.relative_path
    if path.is_symlink() or not path.is_file():
        raise RefusedError(f"{path}: missing, or a link; copy all files of the checkpoint")
    opened = cache(partial(_open, path, info.offset, info.length, before_read))
    return Piece(tuple(chunk.offsets), tuple(chunk.sizes), opened)


def _open(path: Path, offset: int, length: int, before_read: BeforeRead) -> StoredTensor:
    with named(path):
        before_read(path)
        found = open_torch_file(path, offset, length)
    if not isinstance(found, StoredTensor):
        raise RefusedError(f"{path}: no tensor at byte {offset}; the file and {METADATA_FILE} do not belong together")
    return found


def _unstack(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: Sequence[Piece]
) -> list[tuple[str, Mosaic]]:
    """One tensor a layer, where the layers are stacked along the first dimension."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return [(name, Mosaic(name, shape, dtype, pieces))]
    by_layer: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        for number in range(piece.sizes[0]):
            opened = partial(_select, piece, number)
            by_layer[piece.offsets[0] + number].append(Piece(piece.offsets[1:], piece.sizes[1:], opened))
    tensors = []
    for layer in range(shape[0]):
        single = f"decoder.layers.{layer}.{match[1]}"
        tensors.append((single, Mosaic(single, shape[1:], dtype, by_layer[layer])))
    return tensors


def _select(piece: Piece, number: int) -> StoredTensor:
    whole = piece.open()
    if whole.shape != piece.sizes:
        raise RefusedError(f"{whole.path}: a piece of shape {whole.shape}, should be {piece.sizes}")
    return whole.select(number)
