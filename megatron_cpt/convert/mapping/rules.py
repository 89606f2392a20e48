"""How one global Megatron tensor is made of Hugging Face tensors, and they of it: blocks of rows that stand together.

Import, export and the streaming of a part of a tensor are one piece of code each for every kind of tensor, and exact
inverses by construction.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import torch

ReadRows = Callable[[str, slice], torch.Tensor]
"""read(name, slice(first, last)): rows of a tensor, e.g. `HfFolder.read`."""


@dataclass(frozen=True)
class RowBlock:
    """Rows of one Hugging Face tensor that stand together in the Megatron tensor.

    Attributes:
        start: first row in the Megatron tensor.
        source: which of the rule's Hugging Face tensors.
        first: first row there.
        rows: how many.
    """

    start: int
    source: int
    first: int
    rows: int


@dataclass(frozen=True)
class TensorRule:
    """How one global Megatron tensor corresponds to Hugging Face tensors.

    Attributes:
        megatron: name in the local layer spec.
        megatron_shape: of the global tensor.
        hf: names of the Hugging Face tensors.
        hf_shapes: theirs.
        blocks: in the order of the Megatron tensor's rows; together they cover every Hugging Face row once, and all
            Megatron rows but padding.
        padded_vocab: whether padding rows (zeros) follow the last block.
    """

    megatron: str
    megatron_shape: tuple[int, ...]
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    blocks: tuple[RowBlock, ...]
    padded_vocab: bool = False

    def to_megatron(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The global Megatron tensor; where it is one whole Hugging Face tensor, that tensor itself (no copy).

        Args:
            tensors: in the order of `hf`, of shapes `hf_shapes` and one dtype.
        """
        if [tuple(tensor.shape) for tensor in tensors] != list(self.hf_shapes):
            raise ValueError(f"{self.megatron}: shapes {[tuple(t.shape) for t in tensors]}, not {self.hf_shapes}")
        if self._is_copy:
            return tensors[0]
        by_name = dict(zip(self.hf, tensors, strict=True))
        return self.megatron_rows(0, self.megatron_shape[0], lambda name, rows: by_name[name][rows])

    def to_hf(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The Hugging Face tensors; padding rows are cut off. Contiguous parts are views of `tensor`."""
        if tuple(tensor.shape) != self.megatron_shape:
            raise ValueError(f"{self.megatron}: shape {tuple(tensor.shape)}, not {self.megatron_shape}")
        return tuple(
            self.hf_rows(name, 0, shape[0], lambda _, rows: tensor[rows])
            for name, shape in zip(self.hf, self.hf_shapes, strict=True)
        )

    def megatron_rows(self, start: int, stop: int, read: ReadRows) -> torch.Tensor:
        """Rows [start, stop) of the global Megatron tensor, read from rows of the Hugging Face tensors.

        Args:
            start: first row.
            stop: the row after the last.
            read: gives rows of a Hugging Face tensor by name.
        """
        assert 0 <= start < stop <= self.megatron_shape[0], f"{self.megatron}: no rows [{start}, {stop})"
        pieces = []
        at = max(bisect_right(self.blocks, start, key=lambda block: block.start) - 1, 0)
        for block in self.blocks[at:]:
            if block.start >= stop:
                break
            low, high = max(start, block.start), min(stop, block.start + block.rows)
            if low < high:
                first = block.first + low - block.start
                pieces.append((low, read(self.hf[block.source], slice(first, first + high - low))))
        if len(pieces) == 1 and pieces[0][1].shape[0] == stop - start:
            return pieces[0][1]
        dtype = pieces[0][1].dtype if pieces else read(self.hf[0], slice(0, 1)).dtype
        rows = torch.zeros((stop - start, *self.megatron_shape[1:]), dtype=dtype)
        for low, piece in pieces:
            rows[low - start : low - start + piece.shape[0]] = piece
        return rows

    def hf_rows(self, name: str, start: int, stop: int, read: ReadRows) -> torch.Tensor:
        """Rows [start, stop) of a Hugging Face tensor, read from rows of the global Megatron tensor.

        Args:
            name: one of `hf`.
            start: first row.
            stop: the row after the last.
            read: gives rows of the Megatron tensor, called with the name `megatron`.
        """
        source = self.hf.index(name)
        assert 0 <= start < stop <= self.hf_shapes[source][0], f"{name}: no rows [{start}, {stop})"
        pieces = []
        for block in self.blocks:  # blocks of one source are in the order of its rows
            low, high = max(start, block.first), min(stop, block.first + block.rows)
            if block.source == source and low < high:
                first = block.start + low - block.first
                pieces.append(read(self.megatron, slice(first, first + high - low)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @property
    def _is_copy(self) -> bool:
        return len(self.blocks) == 1 and self.blocks[0].rows == self.megatron_shape[0]
