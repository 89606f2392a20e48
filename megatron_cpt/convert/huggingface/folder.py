"""The weights of a Hugging Face folder, read a tensor (or some rows of one) at a time and trusted in nothing.

Every problem names file and tensor, and rows come by `pread` into memory of their own size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.convert.huggingface.header import DTYPES, TensorInfo, pread_into, read_header, read_json_object
from megatron_cpt.convert.huggingface.pickled import PickledShards
from megatron_cpt.errors import RefusedError, UserError

__all__ = ["CONFIG_FILE", "DTYPES", "INDEX_FILE", "SINGLE_FILE", "HfFolder", "TensorInfo", "read_json_object"]

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED_SINGLE, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class HfFolder:
    """A folder with config.json and weights in safetensors (or, if allowed, pickled) shards.

    Attributes:
        path: the folder.
        tensors: every tensor by name, in the order of the shards.
    """

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        """Read and check all headers; no weights.

        Args:
            path: the folder.
            allow_pickle: read pytorch_model.bin (by `weights_only` loading) where there are no safetensors files.

        Raises:
            UserError: there is no such folder.
            RefusedError: a file is missing, malformed or somewhere else, or the weights are pickled.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such folder")
        self._pickled: PickledShards | None = None
        files = self._shards(INDEX_FILE, SINGLE_FILE)
        if files is None:
            self.tensors = self._open_pickled(allow_pickle)
        else:
            self.tensors = self._merge({file: read_header(file) for file in files[0]}, files[1])

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json.

        Raises:
            RefusedError: there is none, or it is no JSON object.
        """
        return read_json_object(self._inside(CONFIG_FILE))

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or rows of its first dimension, in memory of its own.

        Args:
            name: of the tensor.
            rows: slice(first, last), or None for all.

        Raises:
            RefusedError: the file is shorter than its header says.
        """
        info = self.tensors[name]
        first, last = (0, info.shape[0] if info.shape else 1) if rows is None else (rows.start, rows.stop)
        if self._pickled is not None:
            return self._pickled.read(info.file, name, None if rows is None else slice(first, last))
        shape = (last - first, *info.shape[1:]) if info.shape else ()
        row = info.dtype.itemsize * math.prod(info.shape[1:])
        buffer = torch.empty(row * (last - first), dtype=torch.uint8)
        into: Any = buffer.numpy()
        pread_into(info.file, info.start + first * row, memoryview(into), name)
        return buffer.view(info.dtype).reshape(shape)

    # ------------------------------------------------------------------------------------- shards

    def _shards(self, index_name: str, single_name: str) -> tuple[list[Path], dict[str, Path] | None] | None:
        """The shard files, and which tensor the index expects in which; None where there are no such files."""
        index = self.path / index_name
        if os.path.lexists(index):
            weight_map = read_json_object(self._inside(index_name)).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise RefusedError(f"{index}: no weight_map in it")
            files = {name: self._inside(name, index) for name in _in_order(weight_map.values(), index)}
            return list(files.values()), {tensor: files[name] for tensor, name in weight_map.items()}
        if os.path.lexists(self.path / single_name):
            return [self._inside(single_name)], None
        return None

    def _inside(self, name: str, index: Path | None = None) -> Path:
        """A regular file of this folder, links resolved.

        A link may lead out only as the Hugging Face cache lays it: snapshots/REVISION/NAME -> ../../blobs/HASH.
        """
        where = f"{index}: names {name!r}" if index else f"{self.path / name}"
        if not name or "\0" in name or "\\" in name or Path(name).name != name or name in (".", ".."):
            raise RefusedError(f"{where}, which is not a plain file name: refused")
        folder, file = self.path.resolve(), Path(os.path.realpath(self.path / name))
        homes = [folder]
        if folder.parent.name == "snapshots":
            homes.append(folder.parent.parent / "blobs")
        if file.parent not in homes:
            raise RefusedError(f"{where}, a link that leads out of the folder, to {file}: refused")
        if not file.exists():
            raise RefusedError(f"{where}: there is no such file; is the download complete?")
        if not file.is_file():
            raise RefusedError(f"{where}: not a regular file")
        return file

    def _merge(
        self, headers: dict[Path, dict[str, TensorInfo]], expected: dict[str, Path] | None
    ) -> dict[str, TensorInfo]:
        """All tensors of all shards; each in one shard only, and in the one that the index says."""
        tensors: dict[str, TensorInfo] = {}
        for file, header in headers.items():
            for name, info in header.items():
                if name in tensors:
                    raise RefusedError(f"{name}: in two shards, {tensors[name].file} and {file}")
                if expected is not None and expected.get(name) != file:
                    raise RefusedError(f"{file}: holds {name}, which the index {self._listed(expected.get(name))}")
                tensors[name] = info
        for name, file in (expected or {}).items():
            if name not in tensors:
                raise RefusedError(f"{file}: has no {name}, which the index expects in it")
        return tensors

    @staticmethod
    def _listed(file: Path | None) -> str:
        return "does not list" if file is None else f"expects in {file.name}"

    def _open_pickled(self, allow_pickle: bool) -> dict[str, TensorInfo]:
        files = self._shards(_PICKLED_INDEX, _PICKLED_SINGLE)
        if files is None:
            names = sorted(file.name for file in self.path.glob("*.safetensors"))
            found = f"; {', '.join(names[:5])} without an index" if names else ""
            raise RefusedError(f"{self.path}: no {SINGLE_FILE} and no {INDEX_FILE}{found}")
        if not allow_pickle:
            raise RefusedError(
                f"{files[0][0]}: pickled weights can carry code. Use a safetensors version of the model, or "
                "--allow-pickle, which loads tensors only"
            )
        self._pickled = PickledShards()
        headers: dict[Path, dict[str, TensorInfo]] = {}
        for file in files[0]:
            headers[file] = {
                name: TensorInfo(tuple(tensor.shape), tensor.dtype, file, 0, tensor.numel() * tensor.itemsize)
                for name, tensor in self._pickled.open(file).items()
            }
        return self._merge(headers, files[1])


def _in_order(names: Iterable[Any], index: Path) -> list[str]:
    """Each file once; shards are named so that sorting brings their order."""
    unique = set()
    for name in names:
        if not isinstance(name, str):
            raise RefusedError(f"{index}: names {name!r} as a file")
        unique.add(name)
    return sorted(unique)
