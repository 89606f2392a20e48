"""Weights by their global names, wherever they lie: what a conversion reads.

One name a tensor and layer, those of megatron-core's local layer spec (`decoder.layers.3.input_layernorm.weight`). Each
tensor is a mosaic: pieces in files, together the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.convert.job import named
from megatron_cpt.convert.mapping.resolve import te_name
from megatron_cpt.errors import RefusedError

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class Shaped(Protocol):
    """A tensor that can be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""


class Weights(Protocol):
    """Named tensors, read whole or some rows at a time."""

    @property
    def tensors(self) -> Mapping[str, Shaped]:
        """All of them."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One of them, or some of its rows, in memory of its own."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor.

    Attributes:
        offsets, sizes: of the box.
        open: finds its bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    open: Callable[[], StoredTensor]


@dataclass(frozen=True)
class Mosaic:
    """A tensor in pieces.

    Attributes:
        name: for messages.
        shape, dtype: of the whole.
        pieces: boxes that cover it, each element once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Sequence[Piece]

    def check(self) -> None:
        """Do the pieces cover the whole, each element once?

        Raises:
            RefusedError: there is a hole, an overlap, or a piece that sticks out.
        """
        if not self.pieces or len(self.pieces[0].offsets) != len(self.shape):
            raise RefusedError(f"{self.name}: no pieces of shape {self.shape}; the checkpoint is incomplete")
        starts = np.array([piece.offsets for piece in self.pieces], np.int64).reshape(len(self.pieces), len(self.shape))
        sizes = np.array([piece.sizes for piece in self.pieces], np.int64).reshape(starts.shape)
        ends = starts + sizes
        if (starts < 0).any() or (sizes < 0).any() or (ends > np.array(self.shape, np.int64)).any():
            raise RefusedError(f"{self.name}: a piece lies outside of its shape {self.shape}")
        for number in range(len(self.pieces) - 1):
            meets = (starts[number] < ends[number + 1 :]) & (starts[number + 1 :] < ends[number])
            if meets.all(axis=1).any():
                raise RefusedError(f"{self.name}: two pieces overlap at {self.pieces[number].offsets}")
        covered = sum(math.prod(piece.sizes) for piece in self.pieces)
        if covered != math.prod(self.shape):
            raise RefusedError(
                f"{self.name}: {covered:,} of {math.prod(self.shape):,} elements are there; "
                "a piece is missing: are all files of the checkpoint copied?"
            )

    def read(self, rows: slice | None = None) -> torch.Tensor:
        """The whole tensor, or rows of it.

        Raises:
            RefusedError: a file does not hold what it should.
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
            others = [slice(at, at + size) for at, size in zip(piece.offsets[1:], piece.sizes[1:], strict=True)]
            target = out[(slice(first - start, last - start), *others)]
            with named(part.path):
                if target.is_contiguous():
                    part.read_into(target)
                else:
                    target.copy_(part.read())
        return out

    def _stored(self, piece: Piece) -> StoredTensor:
        stored = piece.open()
        if stored.shape != piece.sizes or stored.dtype != self.dtype:
            raise RefusedError(
                f"{self.name}: {stored.path} holds {stored.dtype} {stored.shape}, should be {self.dtype} {piece.sizes}"
            )
        return stored


class MosaicWeights:
    """Tensors in pieces, by name."""

    def __init__(self, tensors: Mapping[str, Mosaic]) -> None:
        self.tensors = tensors
        for mosaic in tensors.values():
            mosaic.check()

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor, or some of its rows.

        Raises:
            RefusedError: its bytes are not what they should be.
        """
        return self.tensors[name].read(rows)


def stored_name(name: str) -> tuple[str, int | None]:
    """Where megatron-core stores a tensor: Transformer Engine's names, and all layers in one tensor.

    Returns:
        The key, and the layer, which is the place along an additional first dimension; None outside of the layers.
    """
    match = _LAYER.fullmatch(te_name(name))
    return (f"decoder.layers.{match[2]}", int(match[1])) if match else (name, None)


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to; None outside of the layers."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None
