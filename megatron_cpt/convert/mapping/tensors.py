"""Tensors of a source, read in parts: each is a mosaic of pieces that are stored in files.

Example: `linear_qkv.weight` of shape (64, 128), saved by two tensor-parallel ranks, is a `Mosaic` of two pieces with
offsets (0, 0) and (32, 0), each of sizes (32, 128). `read(slice(24, 40))` takes rows 24 to 31 from the first piece's
file and rows 0 to 7 from the second piece's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.errors import RefusedError

_MAX_PIECES = 1 << 14  # each pair of pieces is compared


@dataclass(frozen=True)
class Piece:
    """Box of a tensor.

    Attributes:
        offsets, sizes: position and shape of the box in the tensor.
        open: finds the bytes of the box.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    open: Callable[[], StoredTensor]


@dataclass(frozen=True)
class Mosaic:
    """Tensor in pieces, which cover each element once. The name is for messages."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Sequence[Piece]

    def check(self) -> None:
        """Raise unless the pieces cover each element of the tensor once.

        Raises:
            RefusedError: there is a hole or an overlap, or a piece exceeds the shape.
        """
        if not self.pieces or len(self.pieces[0].offsets) != len(self.shape):
            raise RefusedError(
                f"{self.name}: no pieces of shape {self.shape}; the checkpoint is incomplete, copy all of its files"
            )
        if len(self.pieces) > _MAX_PIECES:
            raise RefusedError(f"{self.name}: in {len(self.pieces):,} pieces, above the limit of {_MAX_PIECES:,}")
        starts = np.array([piece.offsets for piece in self.pieces], np.int64).reshape(len(self.pieces), len(self.shape))
        sizes = np.array([piece.sizes for piece in self.pieces], np.int64).reshape(starts.shape)
        ends = starts + sizes
        if (starts < 0).any() or (sizes < 0).any() or (ends > np.array(self.shape, np.int64)).any():
            raise RefusedError(f"{self.name}: a piece exceeds its shape {self.shape}; do not use this checkpoint")
        for number in range(len(self.pieces) - 1):
            overlaps = (starts[number] < ends[number + 1 :]) & (starts[number + 1 :] < ends[number])
            if overlaps.all(axis=1).any():
                offsets = self.pieces[number].offsets
                raise RefusedError(f"{self.name}: two pieces overlap at {offsets}; do not use this checkpoint")
        covered = sum(math.prod(piece.sizes) for piece in self.pieces)
        if covered != math.prod(self.shape):
            raise RefusedError(
                f"{self.name}: the files hold {covered:,} of its {math.prod(self.shape):,} elements; "
                "a piece is missing: copy all files of the checkpoint"
            )

    def read(self, rows: slice | None = None) -> torch.Tensor:
        """Return the tensor, or rows of it.

        Raises:
            RefusedError: a file does not hold the tensor that the checkpoint's description says.
        """
        if not self.shape:
            return self._stored(self.pieces[0]).read()
        start, stop, _ = (rows or slice(None)).indices(self.shape[0])
        out = torch.empty((max(0, stop - start), *self.shape[1:]), dtype=self.dtype)
        for piece in self.pieces:
            first, last = max(start, piece.offsets[0]), min(stop, piece.offsets[0] + piece.sizes[0])
            if first >= last:
                continue
            part = self._stored(piece).rows(first - piece.offsets[0], last - piece.offsets[0])
            other_axes = [slice(at, at + size) for at, size in zip(piece.offsets[1:], piece.sizes[1:], strict=True)]
            target = out[(slice(first - start, last - start), *other_axes)]
            if target.is_contiguous():
                part.read_into(target)
            else:
                target.copy_(part.read())
        return out

    def _stored(self, piece: Piece) -> StoredTensor:
        stored = piece.open()
        if stored.shape != piece.sizes or stored.dtype != self.dtype:
            raise RefusedError(
                f"{stored.path}: holds {stored.dtype} {stored.shape} for {self.name}, but the checkpoint's description "
                f"says {self.dtype} {piece.sizes}; copy the checkpoint again"
            )
        return stored


class MosaicWeights:
    """Tensors in pieces, by name (see `names`).

    Raises:
        RefusedError: the pieces of a tensor do not cover it.
    """

    def __init__(self, tensors: Mapping[str, Mosaic]) -> None:
        self.tensors = tensors
        for mosaic in tensors.values():
            mosaic.check()

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return a tensor, or rows of it; see `Mosaic.read`."""
        return self.tensors[name].read(rows)
