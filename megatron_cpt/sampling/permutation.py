"""Keyed random orders that need no memory.

A shuffled list of n spans costs O(n) time and memory at start-up; for 244 million samples (1T tokens at 4,096) that
is gigabytes and minutes. A Feistel network computes any place of such an order by itself. It permutes a power of four;
values outside of range(n) are sent through again until they fall inside ("cycle walking", Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002), which keeps it a bijection on range(n).
"""

from __future__ import annotations

import hashlib

# Four rounds make a strong pseudo-random permutation if the round function is ideal (Luby and Rackoff, 1988); the
# halves of a small domain have few bits, so a few more rounds are taken: they cost under a microsecond each.
NUM_ROUNDS = 6
MAX_ITEMS = 1 << 62

_MASK64 = (1 << 64) - 1


class Permutation:
    """A bijection on range(n) chosen by a key.

    Args:
        n: size of the domain, 1 to 2^62.
        key: 64 bits, for example of `derive_key`.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= MAX_ITEMS:
            raise ValueError(f"a permutation of {n} items; possible are 1 to {MAX_ITEMS}")
        self.n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = [derive_key(key, round_number) for round_number in range(NUM_ROUNDS)]

    def __call__(self, i: int) -> int:
        """Where place i of the order points to.

        Raises:
            IndexError: i is not in range(n).
        """
        if not 0 <= i < self.n:
            raise IndexError(f"place {i} of a permutation of {self.n} items")
        value = self._encrypt(int(i))
        while value >= self.n:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for round_key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & self._half_mask)
        return left << self._half_bits | right


def derive_key(*parts: int | str) -> int:
    """64 bits that depend on every part, its type and its place; the same on every machine.

    Args:
        parts: integers of any size and strings, for example a seed, a source's name and an epoch.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # type and length go in front, so that ("ab", "c") and ("a", "bc") differ
        text = str(part).encode()
        digest.update(b"%s%d:" % (b"i" if isinstance(part, int) else b"s", len(text)))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little")


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every input bit flips half of the output's."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31
