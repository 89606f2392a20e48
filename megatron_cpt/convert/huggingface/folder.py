"""Weights of a Hugging Face folder, read a tensor (or some of its rows) at a time.

Nothing in the folder is trusted: all headers and names are checked when it is opened. Rows are read with `pread` into
memory of their own size, so memory does not grow with the model.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.convert.huggingface.header import TensorInfo, pread_into, read_header
from megatron_cpt.convert.huggingface.pickled import PickledShards
from megatron_cpt.convert.huggingface.untrusted_json import read_json_object
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.whole_io import exists

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED_SINGLE, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MAX_NAME_BYTES = 255  # of a file name on Linux


class HfFolder:
    """Folder with config.json and weights in safetensors (or, if allowed, pickled) shards.

    Attributes:
        tensors: all tensors by name, in the order of the shards.
    """

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        """Read and check all headers, but no weights.

        Args:
            allow_pickle: read pytorch_model.bin (with `weights_only=True`) if there are no safetensors files.

        Raises:
            UserError: the folder does not exist.
            RefusedError: a file is missing, malformed or outside the folder, or the weights are pickled.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such folder; give a Hugging Face folder")
        self._pickled: PickledShards | None = None
        shards = self._find_shards(INDEX_FILE, SINGLE_FILE)
        if shards is None:
            self.tensors = self._open_pickled(allow_pickle)
        else:
            files, weight_map = shards
            self.tensors = self._merge({file: read_header(file) for file in files}, weight_map)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of config.json.

        Raises:
            RefusedError: the file is missing or is not a JSON object.
        """
        return read_json_object(self._inside(CONFIG_FILE))

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return a tensor, or rows of its first dimension, in newly allocated memory.

        Args:
            rows: slice(first, last), or None for all rows.

        Raises:
            RefusedError: the file is shorter than its header says.
        """
        info = self.tensors[name]
        if self._pickled is not None:
            return self._pickled.read(info.file, name, rows)
        first, last = (0, info.num_rows) if rows is None else (rows.start, rows.stop)
        shape = (last - first, *info.shape[1:]) if info.shape else ()
        buffer = torch.empty(info.row_bytes * (last - first), dtype=torch.uint8)
        numbers: Any = buffer.numpy()
        pread_into(info.file, info.start + first * info.row_bytes, memoryview(numbers), name)
        return buffer.view(info.dtype).reshape(shape)

    def _find_shards(self, index_name: str, single_name: str) -> tuple[list[Path], dict[str, Path] | None] | None:
        """Return the shard files and the index's file per tensor; None if there are no such files."""
        index = self.path / index_name
        if exists(index) or index.is_symlink():
            weight_map = read_json_object(self._inside(index_name)).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise RefusedError(f"{index}: no weight_map in it; is the download complete?")
            for name in weight_map.values():
                if not isinstance(name, str):
                    raise RefusedError(f"{index}: names {name!r} as a file; is the download complete?")
            files = {name: self._inside(name, index) for name in sorted(set(weight_map.values()))}
            return list(files.values()), {tensor: files[name] for tensor, name in weight_map.items()}
        if exists(self.path / single_name) or (self.path / single_name).is_symlink():
            return [self._inside(single_name)], None
        return None

    def _inside(self, name: str, index: Path | None = None) -> Path:
        """Return a regular file of this folder, with links resolved.

        A link may leave the folder only as in the Hugging Face cache: snapshots/REVISION/NAME -> ../../blobs/HASH.
        """
        where = f"{index}: names {name!r}" if index else f"{self.path / name}"
        is_plain = name not in ("", ".", "..") and "\0" not in name and "\\" not in name and Path(name).name == name
        if not is_plain or len(os.fsencode(name)) > _MAX_NAME_BYTES:
            raise RefusedError(f"{where}, which is not a plain file name; do not use this folder")
        folder, file = self.path.resolve(), Path(os.path.realpath(self.path / name))
        homes = [folder]
        if folder.parent.name == "snapshots":
            homes.append(folder.parent.parent / "blobs")
        if file.parent not in homes:
            raise RefusedError(
                f"{where}, a link that leads out of the folder, to {file}; replace the link by a copy of the file"
            )
        if not file.exists():
            raise RefusedError(f"{where}: there is no such file; is the download complete?")
        if not file.is_file():
            raise RefusedError(f"{where}: not a regular file")
        return file

    def _merge(
        self, headers: dict[Path, dict[str, TensorInfo]], weight_map: dict[str, Path] | None
    ) -> dict[str, TensorInfo]:
        """Return the tensors of all shards; each must be in one shard only, the one that the index says."""
        tensors: dict[str, TensorInfo] = {}
        for file, header in headers.items():
            for name, info in header.items():
                if name in tensors:
                    raise RefusedError(f"{name}: in two shards, {tensors[name].file} and {file}; remove one of them")
                if weight_map is not None and weight_map.get(name) != file:
                    listed = weight_map.get(name)
                    expected = "does not list" if listed is None else f"expects in {listed.name}"
                    raise RefusedError(
                        f"{file}: holds {name}, which the index {expected}; copy shards and index of one version"
                    )
                tensors[name] = info
        for name, file in (weight_map or {}).items():
            if name not in tensors:
                raise RefusedError(
                    f"{file}: has no {name}, which the index expects in it; copy shards and index of one version"
                )
        return tensors

    def _open_pickled(self, allow_pickle: bool) -> dict[str, TensorInfo]:
        shards = self._find_shards(_PICKLED_INDEX, _PICKLED_SINGLE)
        if shards is None:
            names = sorted(file.name for file in self.path.glob("*.safetensors"))
            found = f"; {', '.join(names[:5])} without an index" if names else ""
            raise RefusedError(f"{self.path}: no {SINGLE_FILE} and no {INDEX_FILE}{found}; is the download complete?")
        files, weight_map = shards
        if not allow_pickle:
            raise RefusedError(
                f"{files[0]}: pickled weights can carry code. Use a safetensors version of the model, or "
                "--allow-pickle, which loads tensors only"
            )
        self._pickled = PickledShards()
        headers = {
            file: {
                name: TensorInfo(tuple(tensor.shape), tensor.dtype, file, 0, tensor.numel() * tensor.itemsize)
                for name, tensor in self._pickled.open(file).items()
            }
            for file in files
        }
        return self._merge(headers, weight_map)
