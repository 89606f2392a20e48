"""Reader of megatron-core's `dist_checkpointing` format (torch_dist).

The format is used by this package, Megatron-LM, Megatron-Bridge and NeMo 2. It is read without process groups, a tensor
or some of its rows at a time, directly from the place in its file. Layers may be stored one by one or stacked along a
first dimension, under any prefix (`model.`, `module.`), with the names of either layer spec, in pieces of any TP x PP.

Format: torch/distributed/checkpoint/{metadata,filesystem}.py of PyTorch 2.x, megatron/core/dist_checkpointing.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.checkpoint.torchfile.torch_file import open_torch_file
from megatron_cpt.checkpoint.torchfile.unpickle import METADATA_FILE, read_metadata
from megatron_cpt.config.model import MAX_LAYERS
from megatron_cpt.convert.mapping.names import EMBEDDING, local_name
from megatron_cpt.convert.mapping.tensors import Mosaic, MosaicWeights, Piece
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.whole_io import read_text

logger = logging.getLogger(__name__)

COMMON_FILE = "common.pt"
_COMMON_ENTRY = "common_state/shard_0_1"  # the content of common.pt in a shard, as megatron-core 0.19 writes it
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?(optimizer|optim)\.|rng|rerun_state|opt_param_scheduler")
_FP8_STATE = ("_extra_state", ".amax_history")  # Transformer Engine's pickle, and the tensors we store instead of it
_MAX_LAYER_PIECES = 1_000_000  # of all layers of a stacked tensor
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")


class TorchDistWeights(MosaicWeights):
    """Weights of a torch_dist checkpoint.

    Attributes:
        folder: folder of the files.
        tensors: tensors by the local layer spec's names, one per layer.
    """

    def __init__(self, path: Path, before_read: Callable[[Path], None] | None = None) -> None:
        """Read the description of all tensors, but no weights.

        Args:
            path: the folder, or a folder above it.
            before_read: called with a file before any part of it is read, several times and from any thread.

        Raises:
            RefusedError: the checkpoint is corrupt or incomplete, or holds no GPT model.
        """
        self.folder = find_torch_dist(path) or path
        self._before_read = before_read
        try:
            self._metadata = read_metadata(self.folder)
        except FileNotFoundError as error:
            raise RefusedError(
                f"{self.folder / METADATA_FILE}: missing, so this is no torch_dist checkpoint"
            ) from error
        super().__init__(self.collect())

    def common(self) -> Mapping[str, Any]:
        """Return what is stored besides the tensors, such as Megatron-LM's `args`."""
        path = self.folder / COMMON_FILE
        if path.is_file():
            found = open_torch_file(path)
        else:
            places = {index.fqn: info for index, info in self._metadata.storage_data.items()}
            info = places.get(_COMMON_ENTRY)
            if info is None:
                return {}
            path = _shard_path(self.folder, info)
            if self._before_read is not None:
                self._before_read(path)
            found = open_torch_file(path, info.offset, info.length)
            found = found[0] if isinstance(found, list) and found else found
        return found if isinstance(found, dict) else {}

    def keys(self) -> list[str]:
        """Return the names of everything in the shards as the file has them, the optimizer's tensors included."""
        return list(self._metadata.state_dict_metadata)

    def collect(self, prefix: str = "") -> dict[str, Mosaic]:
        """Return the tensors whose names begin with `prefix`, or else the weights, by the local layer spec's names."""
        return _collect_tensors(self.folder, self._metadata, self._before_read, prefix)


def find_torch_dist(path: Path) -> Path | None:
    """Return the folder with `.metadata`: the given one, its newest `iter_*`, or `weights/` in one of them."""
    for folder in (path, newest_iteration(path)):
        for candidate in (folder, folder / "weights", folder / "model_weights") if folder is not None else ():
            if (candidate / METADATA_FILE).is_file():
                return candidate
    return None


def newest_iteration(path: Path) -> Path | None:
    """Return the folder that `latest_checkpointed_iteration.txt` names, else the last `iter_*` in the folder."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        name = read_text(tracker).strip()
        folder = path / (f"iter_{int(name):07d}" if name.isdigit() else "release")
        if folder.is_dir():
            return folder
    found = sorted(folder for folder in path.glob("iter_*") if folder.is_dir())
    return found[-1] if found else None


def _collect_tensors(
    folder: Path, metadata: Any, before_read: Callable[[Path], None] | None, first_part: str
) -> dict[str, Mosaic]:
    places = _places(metadata)
    stored = {
        key.removeprefix(first_part): entry
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks") and key.startswith(first_part)
    }
    stored = {
        key: entry
        for key, entry in stored.items()
        if not _NOT_WEIGHTS.match(key) and not any(part in key for part in _FP8_STATE)
    }
    prefix = _find_prefix(folder, stored)
    tensors: dict[str, Mosaic] = {}
    for key, entry in stored.items():
        if not key.startswith(prefix):
            logger.warning("%s: %s is not a tensor of the model; it is ignored", folder, key)
            continue
        shape, dtype = tuple(entry.size), entry.properties.dtype
        pieces = [_piece(folder, first_part + key, chunk, places, before_read) for chunk in entry.chunks]
        for name, mosaic in _unstack(first_part, local_name(key[len(prefix) :]), shape, dtype, pieces):
            if name in tensors:
                raise RefusedError(f"{folder}: two tensors are {name}; do not use this checkpoint")
            tensors[name] = mosaic
    return tensors


def _find_prefix(folder: Path, keys: Mapping[str, Any]) -> str:
    """Return the prefix of all keys of the model, such as `model.`, from the key of the embedding."""
    found = sorted({key[: -len(EMBEDDING)] for key in keys if key == EMBEDDING or key.endswith(f".{EMBEDDING}")})
    if len(found) != 1:
        count = "no" if not found else f"{len(found)} ({', '.join(found)})"
        raise RefusedError(f"{folder}: {count} {EMBEDDING}; this is not a checkpoint of one GPT model of megatron-core")
    return found[0]


def _places(metadata: Any) -> dict[tuple[str, tuple[int, ...]], Any]:
    """Return file, offset and length of every piece by (key, offsets of the piece)."""
    stored = metadata.storage_data.items()
    return {(index.fqn, tuple(index.offset)): info for index, info in stored if index.offset is not None}


def _shard_path(folder: Path, info: Any) -> Path:
    """Return the file that holds an entry; refuse missing files and links."""
    path = folder / str(info.relative_path)
    if path.is_symlink() or not path.is_file():
        raise RefusedError(f"{path}: missing, or a link; copy all files of the checkpoint")
    return path


def _piece(
    folder: Path,
    key: str,
    chunk: Any,
    places: Mapping[tuple[str, tuple[int, ...]], Any],
    before_read: Callable[[Path], None] | None,
) -> Piece:
    info = places.get((key, tuple(chunk.offsets)))
    if info is None:
        raise RefusedError(
            f"{folder}: {key}: no file holds its piece at {tuple(chunk.offsets)}; copy the checkpoint again"
        )
    if getattr(info, "transform_descriptors", None):
        raise RefusedError(
            f"{folder}: {key}: stored with the transforms {info.transform_descriptors}, which are not read here; save "
            "the checkpoint without them"
        )
    path = _shard_path(folder, info)
    opened = cache(partial(_open, path, info.offset, info.length, before_read))
    return Piece(tuple(chunk.offsets), tuple(chunk.sizes), opened)


def _open(path: Path, offset: int, length: int, before_read: Callable[[Path], None] | None) -> StoredTensor:
    if before_read is not None:
        before_read(path)
    found = open_torch_file(path, offset, length)
    if not isinstance(found, StoredTensor):
        raise RefusedError(
            f"{path}: no tensor at byte {offset}; the file and {METADATA_FILE} do not belong together: copy the "
            "checkpoint again"
        )
    return found


def _unstack(
    prefix: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: Sequence[Piece]
) -> list[tuple[str, Mosaic]]:
    """Return one tensor per layer if the layers are stacked along the first dimension, else the tensor itself.

    Example: `decoder.layers.mlp.linear_fc2.weight` of shape (4, 128, 512) becomes `decoder.layers.0.mlp...` to
    `decoder.layers.3.mlp...`, each of shape (128, 512).
    """
    match = _STACKED.fullmatch(name)
    if match is None:
        return [(prefix + name, Mosaic(prefix + name, shape, dtype, pieces))]
    if not shape or shape[0] > MAX_LAYERS or sum(piece.sizes[0] for piece in pieces) > _MAX_LAYER_PIECES:
        raise RefusedError(f"{prefix}{name}: shape {shape} has no or too many layers; do not use this checkpoint")
    pieces_by_layer: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        for index in range(piece.sizes[0]):
            opened = partial(_select, piece, index)
            pieces_by_layer[piece.offsets[0] + index].append(Piece(piece.offsets[1:], piece.sizes[1:], opened))
    tensors = []
    for layer in range(shape[0]):
        layer_name = f"{prefix}decoder.layers.{layer}.{match[1]}"
        tensors.append((layer_name, Mosaic(layer_name, shape[1:], dtype, pieces_by_layer[layer])))
    return tensors


def _select(piece: Piece, index: int) -> StoredTensor:
    stacked = piece.open()
    if stacked.shape != piece.sizes:
        raise RefusedError(
            f"{stacked.path}: a piece has shape {stacked.shape}, but {METADATA_FILE} says {piece.sizes}; copy the "
            "checkpoint again"
        )
    return stacked.select(index)
