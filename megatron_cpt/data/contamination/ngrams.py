"""N-grams of ids as 64-bit hashes, many millions a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no power of it is 0 modulo 2^64
_CHUNK = 1 << 15  # hashes made at a time: all that lies between stays in the cache


def ngram_hashes(tokens: npt.NDArray[Any], n: int) -> npt.NDArray[np.uint64]:
    """A hash of each run of n ids: a polynomial in scrambled ids modulo 2^64, so the order of the ids counts.

    Runs of 1, 2, 4, ... ids are joined to runs of n, which takes about log2(n) passes instead of n.

    Returns:
        uint64 (max(0, len(tokens) - n + 1),): entry i is of tokens [i, i + n).
    """
    assert n > 0
    hashes = np.empty(max(0, len(tokens) - n + 1), np.uint64)
    for start in range(0, len(hashes), _CHUNK):
        part = hashes[start : start + _CHUNK]
        part[:] = _hash_runs(tokens[start : start + len(part) + n - 1], n)
    return hashes


def windows_inside(bounds: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.bool_]:
    """Which runs of n ids lie inside one document.

    Args:
        bounds: where each document begins in the tokens, and where the last one ends; from 0, never falling.
        n: ids a run.

    Returns:
        bool (max(0, bounds[-1] - n + 1),): entry i is of the run that begins at token i.
    """
    num_windows = max(0, int(bounds[-1]) - n + 1)
    inside = np.ones(num_windows, np.bool_)
    if num_windows and n > 1:
        # the last n - 1 places of a document begin runs that leave it
        crossing = (bounds[1:-1, None] - np.arange(1, n)).ravel()
        inside[crossing[(crossing >= 0) & (crossing < num_windows)]] = False
    return inside


class HashSet:
    """A fixed set of 64-bit hashes that many others are looked up in.

    A small table rules most of them out; only the rest are searched for.

    Args:
        hashes: the members, in any order; copies are dropped.
    """

    def __init__(self, hashes: npt.NDArray[np.uint64]) -> None:
        self.values = np.unique(hashes)
        # 8 to 16 places a member: at most 1 in 8 strangers passes
        bits = max(10, (8 * len(self.values)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, np.bool_)
        self._table[self.values >> self._shift] = True

    def __len__(self) -> int:
        return len(self.values)

    def find(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which of these are members.

        Returns:
            int64, int64: their places in `hashes`, ascending, and their places in `values`.
        """
        if not len(self.values):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        chunks = range(0, len(hashes), _CHUNK)
        passing = [start + np.flatnonzero(self._passes(hashes[start : start + _CHUNK])) for start in chunks]
        places = np.concatenate(passing) if passing else np.empty(0, np.int64)
        members = np.minimum(np.searchsorted(self.values, hashes[places]), len(self.values) - 1)
        found = self.values[members] == hashes[places]
        return places[found], members[found]

    def _passes(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        return self._table.take((hashes >> self._shift).view(np.int64))


def _hash_runs(tokens: npt.NDArray[Any], n: int) -> npt.NDArray[np.uint64]:
    power, size = _scramble(tokens), 1  # runs of `size` ids, a power of two
    joined, joined_size = power[:0], 0
    while True:
        if n & size:
            joined = _join(joined, joined_size, power, size) if joined_size else power
            joined_size += size
        if joined_size == n:
            return joined
        power, size = _join(power, size, power, size), 2 * size


def _scramble(tokens: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Ids spread over 64 bits by the finalizer of SplitMix64: sums of multiples of them do not meet but by chance."""
    value = tokens.astype(np.uint64) + np.uint64(_FACTOR)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


def _join(
    left: npt.NDArray[np.uint64], left_size: int, right: npt.NDArray[np.uint64], right_size: int
) -> npt.NDArray[np.uint64]:
    """Hashes of runs of left_size ids and of the right_size ids after them."""
    length = min(len(left), max(0, len(right) - left_size))
    factor = np.uint64(pow(_FACTOR, right_size, 1 << 64))
    return left[:length] * factor + right[left_size : left_size + length]
