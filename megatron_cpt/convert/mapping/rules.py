"""Rule between one global Megatron tensor and the Hugging Face tensors that it is made of, as blocks of rows.

Import, export and reading of a few rows use the same blocks, so an export is the exact inverse of an import.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

ReadRows = Callable[[str, slice], torch.Tensor]
"""read(name, slice(first, last)) returns rows of a tensor, like `HfFolder.read`."""


@dataclass(frozen=True)
class RowBlock:
    """Contiguous rows of one Hugging Face tensor inside the Megatron tensor.

    Example: `RowBlock(start=16, source=1, first=0, rows=8)` says that rows 16 to 23 of the Megatron tensor are rows
    0 to 7 of the rule's second Hugging Face tensor.
    """

    start: int
    source: int
    first: int
    rows: int


@dataclass(frozen=True)
class TensorRule:
    """Correspondence between one global Megatron tensor and one or more Hugging Face tensors.

    Example: a gated MLP with `ffn_hidden` 24 has `hf=("...gate_proj.weight", "...up_proj.weight")` and the blocks
    (0, 0, 0, 24) and (24, 1, 0, 24). `megatron_rows(20, 28, read)` then reads rows 20 to 23 of gate_proj and rows 0 to
    3 of up_proj.

    Attributes:
        megatron: name of the Megatron tensor in the local layer spec.
        hf, hf_shapes: names and shapes of the Hugging Face tensors.
        blocks: blocks in the order of the Megatron tensor's rows. They cover each Hugging Face row once, and all
            Megatron rows except padding.
        padded_vocab: whether rows of padding (zeros) follow the last block.
    """

    megatron: str
    megatron_shape: tuple[int, ...]
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    blocks: tuple[RowBlock, ...]
    padded_vocab: bool = False

    def in_layer(self, layer: int) -> TensorRule:
        """Return the rule with `*` in its names replaced by the number of a layer."""
        megatron, *hf = (name.replace("*", str(layer)) for name in (self.megatron, *self.hf))
        return replace(self, megatron=megatron, hf=tuple(hf))

    def megatron_rows(self, start: int, stop: int, read: ReadRows) -> torch.Tensor:
        """Return rows [start, stop) of the global Megatron tensor; `read` reads rows of the Hugging Face tensors."""
        assert 0 <= start < stop <= self.megatron_shape[0], f"{self.megatron}: no rows [{start}, {stop})"
        pieces = []
        first_block = max(bisect_right(self.blocks, start, key=lambda block: block.start) - 1, 0)
        for block in self.blocks[first_block:]:
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
        """Return rows [start, stop) of a Hugging Face tensor; `read` reads rows of the Megatron tensor."""
        source = self.hf.index(name)
        assert 0 <= start < stop <= self.hf_shapes[source][0], f"{name}: no rows [{start}, {stop})"
        pieces = []
        for block in self.blocks:  # blocks of one source are in the order of its rows
            low, high = max(start, block.first), min(stop, block.first + block.rows)
            if block.source == source and low < high:
                first = block.start + low - block.first
                pieces.append(read(self.megatron, slice(first, first + high - low)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
