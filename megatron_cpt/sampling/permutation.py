"""Keyed random permutations in constant memory.

Shuffling a list of n spans takes O(n) time and memory at startup: minutes and gigabytes for 244 million samples (1T
tokens in samples of 4,096). A Feistel network computes single entries of a permutation instead. Its domain is a power
of four; a result outside range(n) is encrypted again until it falls inside ("cycle walking", Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002), which makes it a bijection on range(n).
"""

from __future__ import annotations

import hashlib

# Four rounds suffice if the round function is ideal (Luby and Rackoff, 1988). The halves of a small domain have few
# bits, so two more rounds are added; each takes under a microsecond.
NUM_ROUNDS = 6
MAX_ITEMS = 1 << 62

_MASK64 = (1 << 64) - 1


class Permutation:
    """Bijection on range(n), chosen by a key.

    Example:
        >>> order = Permutation(5, key=7)
        >>> sorted(order(i) for i in range(5))
        [0, 1, 2, 3, 4]

    Args:
        n: size of the domain, 1 to 2^62.
        key: 64 bits, for example from `derive_key`.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= MAX_ITEMS:
            raise ValueError(f"a permutation of {n} items: the size must be from 1 to {MAX_ITEMS}")
        self.n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = [derive_key(key, round_number) for round_number in range(NUM_ROUNDS)]

    def __call__(self, i: int) -> int:
        """Return entry i of the permutation.

        Raises:
            IndexError: i is not in range(n).
        """
        if not 0 <= i < self.n:
            raise IndexError(f"entry {i} of a permutation of {self.n} items")
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
    """Hash the parts to 64 bits; equal on every machine, and different if a part, its type or its position differs.

    Args:
        parts: strings and integers of any size, for example a seed, a source's name and an epoch.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # type and length come first, so that ("ab", "c") and ("a", "bc") differ
        text = str(part).encode()
        digest.update(b"%s%d:" % (b"i" if isinstance(part, int) else b"s", len(text)))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little")


def _mix(value: int) -> int:
    """Apply SplitMix64's finalizer (Steele, Lea, Flood, OOPSLA 2014): each input bit flips half of the output bits."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31
