"""Records of a cache: the teacher's k most likely next tokens at a position of a token file, and the mass of the rest.

    bytes             content
    4                 check: XXH3 of the other bytes, with the position as its seed; the lower 32 bits
    2                 fp16, log of the probability that all other tokens have together
    2 x k             fp16, log-probabilities of the k tokens, in descending order
    2 x k or 4 x k    ids of the tokens: uint16 for a vocabulary of up to 65,536 ids, else uint32

fp16 keeps 11 bits of a log-probability, bf16 would keep 8. A loss first normalizes the k + 1 probabilities, so that
rounding them changes a divergence only in second order.

Every record can be verified alone. So a sample is verified when it is read, an interrupted `teach` finds the records
that it still has to write, and a record of another position or another cache is never taken for a valid one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Records = npt.NDArray[np.void]

DEFAULT_TOP_K = 64

_CHECK_BYTES = 4
_CHECK_MASK = (1 << 32) - 1
_SEED_MASK = (1 << 64) - 1
_LOWEST = float(np.finfo(np.float16).min)  # stands for the logarithm of 0


@dataclass(frozen=True)
class RecordFormat:
    """Format of the records of one cache.

    Attributes:
        top_k: number of tokens per record.
        vocab: ids of the teacher are below it.
    """

    top_k: int
    vocab: int

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """Type of a record, without gaps."""
        id_type = np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")
        fields = [
            ("check", "<u4"),
            ("log_tail", "<f2"),
            ("log_probs", "<f2", (self.top_k,)),
            ("ids", id_type, (self.top_k,)),
        ]
        return np.dtype(fields)

    @property
    def num_bytes(self) -> int:
        """Bytes per record, so per token of a source."""
        return self.dtype.itemsize

    def make(
        self, ids: npt.NDArray[Any], log_probs: npt.NDArray[Any], log_tail: npt.NDArray[Any], seeds: npt.NDArray[Any]
    ) -> Records:
        """Return records.

        Args:
            ids, log_probs: (n, k).
            log_tail: (n,), -inf where no other token is possible.
            seeds: (n,), see `record_seeds`.
        """
        records = np.zeros(len(ids), self.dtype)
        records["ids"] = ids
        records["log_probs"] = np.maximum(log_probs, _LOWEST)
        records["log_tail"] = np.maximum(log_tail, _LOWEST)
        records["check"] = self._checks(records, seeds)
        return records

    def is_intact(self, records: Records, seeds: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return which records are as they were written for their position; arguments as for `make`."""
        intact: npt.NDArray[np.bool_] = records["check"] == self._checks(records, seeds)
        return intact

    def _checks(self, records: Records, seeds: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
        content = records.view(np.uint8).reshape(len(records), self.num_bytes)[:, _CHECK_BYTES:]
        hashes = map(xxhash.xxh3_64_intdigest, np.ascontiguousarray(content), seeds.tolist())
        return np.fromiter((value & _CHECK_MASK for value in hashes), np.uint32, len(records))


def record_seeds(key: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Return the seeds of the records at positions [start, start + count) of a file.

    Args:
        key: 64 bits that belong to the cache and the file.
    """
    return np.uint64((key + start) & _SEED_MASK) + np.arange(count, dtype=np.uint64)
