"""Pickled weights (pytorch_model.bin), read without running code from the file, one shard at a time."""

from __future__ import annotations

import pickle
import threading
import zipfile
from pathlib import Path

import torch

from megatron_cpt.checkpoint.torchfile.torch_file import (
    check_legacy_torch_file,
    check_torch_file,
    raise_disk_error,
)
from megatron_cpt.errors import RefusedError


class PickledShards:
    """Tensors of pickled shards.

    `torch.load(weights_only=True)` builds tensors and plain containers, and calls nothing else. Storages are memory
    maps, and only the latest shard stays open, so that mapped pages never add up to the whole model.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def open(self, file: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of one shard.

        Raises:
            RefusedError: the shard is corrupt, needs code to load, or holds something other than tensors.
        """
        if file != self._file:
            self._file, self._tensors = None, {}
            self._tensors = _load(file)
            self._file = file
        return self._tensors

    def read(self, file: Path, name: str, rows: slice | None) -> torch.Tensor:
        """Return a copy of a tensor of a shard, or of some of its rows."""
        with self._lock:
            tensor = self.open(file)[name]
        part = tensor if rows is None else tensor[rows]
        return part.clone(memory_format=torch.contiguous_format)


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        is_zip = zipfile.is_zipfile(file)  # otherwise written before torch 1.6
        check = check_torch_file if is_zip else check_legacy_torch_file
        check(file)  # torch.load builds whatever size a pickle asks for
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise RefusedError(
            f"{file}: holds more than tensors, or is corrupt ({reason}); use a safetensors version of the model"
        ) from error
    except RefusedError:
        raise
    except Exception as error:  # damaged bytes can make an unpickler raise anything
        raise_disk_error(error)
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise RefusedError(f"{file}: cannot be read: {reason}; copy the file again") from error
    if not isinstance(state, dict):
        raise RefusedError(f"{file}: holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise RefusedError(f"{file}: {name!r} is not a plain tensor under a name")
    return state
