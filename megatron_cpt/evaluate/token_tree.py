"""Packing of many token sequences into few rows, in which shared prefixes are stored once. Imports no torch.

A row is a forest of tokens in depth-first order. The sequences `a b c`, `a b d` and `x` make the row

    index      0  1  2  3  4
    token      a  b  c  d  x
    position   0  1  2  2  0
    end        4  4  3  4  5

A token attends to itself and to its ancestors: token j sees token i if `i <= j < end[i]`. So a few-shot prompt that
many requests share, or a question with four answers, is computed once per row.

Attention over a whole row would compute mostly hidden pairs of tokens. So a row is cut into segments: the tokens of a
long shared prefix are one, and the subtrees below it are others, which see the prefix and themselves.

The rows depend on the set of sequences only, not on their order: the sequences are sorted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_NEEDED = 512  # tokens of a row whose logits are needed
_SEGMENT = 256  # tokens; smaller segments hide fewer pairs, but their kernels are less efficient


class RowSegment(NamedTuple):
    """Consecutive tokens of a row that see a shared prefix and, by the rule above, themselves.

    Attributes:
        prefix: ranges of the row; every token of the segment sees all of their tokens.
        start, stop: the tokens.
    """

    prefix: tuple[range, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TokenRow:
    """Tokens of one forward pass.

    Attributes:
        tokens: (s,) token ids; padding is 0.
        positions: (s,) position of each token in its sequence.
        ends: (s,) index after the last descendant of each token. A token of padding is alone in its tree.
        num_tokens: number of tokens without padding.
        paths: for each sequence of this row, by its number, the indices of its tokens.
    """

    tokens: Ids
    positions: Ids
    ends: Ids
    num_tokens: int
    paths: dict[int, Ids]

    def __len__(self) -> int:
        return len(self.tokens)


def segments_of(ends: Ids) -> list[RowSegment]:
    """Cut a row into segments: trees of more than 256 tokens into their shared prefix and what follows it.

    Args:
        ends: of a `TokenRow`.

    Example: 300 tokens with the continuations of 200 and 100 tokens become the segments [0, 300), [300, 500) and
    [500, 600); the prefix of the last two is [0, 300).
    """
    found = []
    forests: list[tuple[int, int, tuple[range, ...]]] = [(0, len(ends), ())]
    while forests:
        start, stop, prefix = forests.pop()
        first = start  # of the small trees that wait for their segment
        while start < stop:
            end = int(ends[start])
            if end - start > _SEGMENT or end - first > _SEGMENT:
                found += [RowSegment(prefix, first, start)] if first < start else []
                first = start
            if end - start > _SEGMENT:
                trunk = start + 1 + int(np.argmin(np.append(ends[start + 1 : end] == end, False)))
                found.append(RowSegment(prefix, start, trunk))
                forests.append((trunk, end, _joined(prefix, range(start, trunk))))
                first = end
            start = end
        found += [RowSegment(prefix, first, stop)] if first < stop else []
    return sorted(found, key=lambda segment: segment.start)


def _joined(ranges: tuple[range, ...], last: range) -> tuple[range, ...]:
    if ranges and ranges[-1].stop == last.start:
        return (*ranges[:-1], range(ranges[-1].start, last.stop))
    return (*ranges, last)


def pack_rows(
    sequences: Sequence[tuple[int, ...]], *, budget: int, multiple: int, needed: Sequence[int] | None = None
) -> list[TokenRow]:
    """Pack all sequences, none of them empty, into rows; longest row first.

    Args:
        budget: largest number of tokens in a row; a longer sequence gets a row of its own.
        multiple: row lengths are padded to a multiple of this.
        needed: tokens of each sequence whose logits are needed, at most 512 in a row of several sequences: their
            logits take far more memory than the row.
    """
    order = sorted(range(len(sequences)), key=lambda number: (sequences[number], number))
    rows, builder, num_needed = [], _RowBuilder(), 0
    for number in order:
        ids = np.array(sequences[number], dtype=np.int64)
        own = 0 if needed is None else needed[number]
        if builder.paths and (builder.length_with(ids) > budget or num_needed + own > _NEEDED):
            rows.append(builder.build(multiple))
            builder, num_needed = _RowBuilder(), 0
        builder.add(number, ids)
        num_needed += own
    if builder.paths:
        rows.append(builder.build(multiple))
    return sorted(rows, key=len, reverse=True)  # a stable sort


class _RowBuilder:
    """A row that grows by sequences in sorted order, so a new one shares its prefix with the last one at most."""

    def __init__(self) -> None:
        self.paths: dict[int, Ids] = {}
        self._tokens: list[Ids] = []
        self._positions: list[Ids] = []
        self._length = 0
        self._last_ids = np.empty(0, dtype=np.int64)
        self._last_path = np.empty(0, dtype=np.int64)
        self._finished: list[tuple[Ids, int]] = []  # indices of tokens, and the end of their trees

    def length_with(self, ids: Ids) -> int:
        return self._length + len(ids) - self._num_shared(ids)

    def add(self, number: int, ids: Ids) -> None:
        shared = self._num_shared(ids)
        self._finished.append((self._last_path[shared:], self._length))
        new = np.arange(self._length, self._length + len(ids) - shared)
        self._tokens.append(ids[shared:])
        self._positions.append(np.arange(shared, len(ids)))
        self._length += len(new)
        self._last_ids, self._last_path = ids, np.concatenate([self._last_path[:shared], new])
        self.paths[number] = self._last_path

    def build(self, multiple: int) -> TokenRow:
        length = -(-self._length // multiple) * multiple
        ends = np.arange(1, length + 1)
        for indices, end in [*self._finished, (self._last_path, self._length)]:
            ends[indices] = end
        tokens, positions = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
        tokens[: self._length] = np.concatenate(self._tokens)
        positions[: self._length] = np.concatenate(self._positions)
        return TokenRow(tokens, positions, ends, self._length, self.paths)

    def _num_shared(self, ids: Ids) -> int:
        length = min(len(ids), len(self._last_ids))
        different = np.flatnonzero(ids[:length] != self._last_ids[:length])
        return int(different[0]) if len(different) else length
