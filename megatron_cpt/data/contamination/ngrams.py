"""64-bit hashes of n-grams of ids, many million per second."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no power of it is 0 modulo 2^64
_BLOCK_HASHES = 1 << 15  # hashes computed at a time, so that intermediate results stay in the CPU cache


def ngram_hashes(tokens: npt.NDArray[Any], n: int) -> npt.NDArray[np.uint64]:
    """Hash every n-gram: a polynomial in scrambled ids modulo 2^64, so the order of the ids counts.

    Hashes of 1, 2, 4, ... ids are joined to hashes of n ids, in about log2(n) passes instead of n. Example: n = 13 is
    joined from 1 + 4 + 8 ids.

    Returns:
        uint64 (max(0, len(tokens) - n + 1),): entry i is the hash of tokens [i, i + n).
    """
    assert n > 0
    hashes = np.empty(max(0, len(tokens) - n + 1), np.uint64)
    for start in range(0, len(hashes), _BLOCK_HASHES):
        part = hashes[start : start + _BLOCK_HASHES]
        part[:] = _hash_runs(tokens[start : start + len(part) + n - 1], n)
    return hashes


def ngrams_inside(bounds: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.bool_]:
    """Mark the n-grams that are inside one document.

    Example: documents of 3 and 2 ids, n = 2: [True, True, False, True]; the third 2-gram crosses the boundary.

    Args:
        bounds: offset of each document in the tokens, and the end of the last one; ascending from 0.
        n: ids per n-gram.

    Returns:
        bool (max(0, bounds[-1] - n + 1),): entry i is for the n-gram that starts at token i.
    """
    num_ngrams = max(0, int(bounds[-1]) - n + 1)
    is_inside = np.ones(num_ngrams, np.bool_)
    if num_ngrams and n > 1:
        # n-grams that start at the last n - 1 tokens of a document cross its end
        crossing = (bounds[1:-1, None] - np.arange(1, n)).ravel()
        is_inside[crossing[(crossing >= 0) & (crossing < num_ngrams)]] = False
    return is_inside


class HashSet:
    """Fixed set of 64-bit hashes, fast at looking up many others.

    A small table of prefixes rules out most hashes; only the others need a binary search.

    Args:
        hashes: members in any order, with or without duplicates.

    Attributes:
        values: members in ascending order, without duplicates.
    """

    def __init__(self, hashes: npt.NDArray[np.uint64]) -> None:
        self.values = np.unique(hashes)
        # 8 to 16 table entries per member: at most 1 in 8 of other hashes passes
        bits = max(10, (8 * len(self.values)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, np.bool_)
        self._table[self.values >> self._shift] = True

    def __len__(self) -> int:
        return len(self.values)

    def find(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Find the members among these hashes.

        Returns:
            Indices of the members in `hashes`, ascending, and their indices in `values`; both int64.
        """
        if not len(self.values):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        starts = range(0, len(hashes), _BLOCK_HASHES)
        passing = [start + np.flatnonzero(self._may_contain(hashes[start : start + _BLOCK_HASHES])) for start in starts]
        indices = np.concatenate(passing) if passing else np.empty(0, np.int64)
        members = np.minimum(np.searchsorted(self.values, hashes[indices]), len(self.values) - 1)
        is_member = self.values[members] == hashes[indices]
        return indices[is_member], members[is_member]

    def _may_contain(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        return self._table.take((hashes >> self._shift).view(np.int64))


def _hash_runs(tokens: npt.NDArray[Any], n: int) -> npt.NDArray[np.uint64]:
    power, size = _scramble(tokens), 1  # hashes of `size` ids, a power of two
    joined, joined_size = power[:0], 0
    while True:
        if n & size:
            joined = _join(joined, joined_size, power, size) if joined_size else power
            joined_size += size
        if joined_size == n:
            return joined
        power, size = _join(power, size, power, size), 2 * size


def _scramble(tokens: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Spread ids over 64 bits with SplitMix64's finalizer, so that sums of multiples collide only by chance."""
    value = tokens.astype(np.uint64) + np.uint64(_FACTOR)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


def _join(
    left: npt.NDArray[np.uint64], left_size: int, right: npt.NDArray[np.uint64], right_size: int
) -> npt.NDArray[np.uint64]:
    """Join hashes of left_size ids with hashes of the right_size ids that follow."""
    length = min(len(left), max(0, len(right) - left_size))
    factor = np.uint64(pow(_FACTOR, right_size, 1 << 64))
    return left[:length] * factor + right[left_size : left_size + length]
