"""Where encoded documents wait until a data set is made of them: in their order, or in buckets to be shuffled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.preprocess.inputs import Block
from megatron_cpt.data.preprocess.work_folder import WorkFolder
from megatron_cpt.data.preprocess.workers import EncodedTexts

BUCKET_BYTES = 1 << 28  # of text; a bucket's tokens are shuffled in memory
MAX_BUCKETS = 1 << 12
_BUFFERED = 1 << 28  # bytes of all buckets together

ENTRY = np.dtype([("order", "<u8"), ("size", "<i4")])
"""What a bucket keeps of a document: its place in the shuffled order, and its number of tokens."""


class Sink(Protocol):
    """Takes the documents of one key."""

    def add(self, block: Block, texts: EncodedTexts) -> None:
        """Takes the documents of a block."""
        ...

    def flush(self) -> None:
        """Hands everything to the folder."""
        ...


class OrderedSink:
    """Documents in the order of the input: `N.tokens` and `N.sizes` for key number N.

    Args:
        folder: where.
        number: of the key.
    """

    def __init__(self, folder: WorkFolder, number: int) -> None:
        self._folder = folder
        self._tokens, self._sizes = ordered_names(number)

    def add(self, block: Block, texts: EncodedTexts) -> None:
        """Takes the documents of a block."""
        if texts.lengths.size:
            self._folder.append(self._tokens, np.ascontiguousarray(texts.tokens).data)
            self._folder.append(self._sizes, texts.lengths.astype("<i4").data)

    def flush(self) -> None:
        """Nothing waits here."""


class ShuffledSink:
    """Documents in buckets by a random number that follows from the seed and the document's place in the input.

    So neither workers nor shards nor restarts change the order; the buckets, each sorted by that number, one after
    another are the documents in a uniformly random order.

    Args:
        folder: where.
        number: of the key.
        seed: of the order.
        num_buckets: a power of two.
    """

    def __init__(self, folder: WorkFolder, number: int, seed: int, num_buckets: int) -> None:
        self._folder = folder
        self._number = number
        self._seed = seed
        self._shift = 64 - num_buckets.bit_length() + 1
        self._waiting: dict[int, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = {}
        self._waiting_bytes = 0

    def add(self, block: Block, texts: EncodedTexts) -> None:
        """Takes the documents of a block."""
        order = np.random.PCG64([self._seed, block.file, block.position]).random_raw(texts.lengths.size)
        buckets = (order >> np.uint64(self._shift)).astype(np.int64) if self._shift < 64 else np.zeros(order.size, int)
        entries = np.empty(order.size, ENTRY)
        entries["order"], entries["size"] = order, texts.lengths
        # Grouped by bucket first: a block touches many buckets, and each takes its part in one piece.
        grouped = np.argsort(buckets, kind="stable")
        tokens = gather(texts.tokens, texts.lengths, grouped)
        entries = entries[grouped]
        ends = np.cumsum(entries["size"], dtype=np.int64)
        bounds = [*np.flatnonzero(np.diff(buckets[grouped], prepend=-1)).tolist(), order.size]
        for first, last in itertools.pairwise(bounds):
            begin = int(ends[first - 1]) if first else 0
            part = (tokens[begin : int(ends[last - 1])], entries[first:last])
            self._waiting.setdefault(int(buckets[grouped[first]]), []).append(part)
        self._waiting_bytes += tokens.nbytes + entries.nbytes
        if self._waiting_bytes > _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Hands everything to the folder."""
        for bucket, parts in self._waiting.items():
            tokens_name, entries_name = bucket_names(self._number, bucket)
            self._folder.append(tokens_name, np.concatenate([tokens for tokens, _ in parts]).data)
            self._folder.append(entries_name, np.concatenate([entries for _, entries in parts]).tobytes())
        self._waiting.clear()
        self._waiting_bytes = 0


def ordered_names(number: int) -> tuple[str, str]:
    """Files of key number `number`: tokens and sizes."""
    return f"{number}.tokens", f"{number}.sizes"


def bucket_names(number: int, bucket: int) -> tuple[str, str]:
    """Files of a bucket of key number `number`: tokens and entries."""
    return f"{number}.{bucket:04}.tokens", f"{number}.{bucket:04}.entries"


def count_buckets(text_bytes: int) -> int:
    """Buckets for about so much text: a power of two."""
    wanted = -(-text_bytes // BUCKET_BYTES)
    return min(MAX_BUCKETS, 1 << max(0, wanted - 1).bit_length())


def gather(tokens: npt.NDArray[Any], sizes: npt.NDArray[Any], chosen: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The tokens of documents in another order.

    Args:
        tokens: of all documents, one after another.
        sizes: tokens of each.
        chosen: numbers of the documents that are wanted, in their new order.
    """
    begins = np.cumsum(sizes, dtype=np.int64) - sizes
    lengths = sizes[chosen].astype(np.int64)
    shift = begins[chosen] - (np.cumsum(lengths) - lengths)  # from a token's new place to its old one
    reordered: npt.NDArray[Any] = tokens[np.arange(int(lengths.sum())) + np.repeat(shift, lengths)]
    return reordered


def shuffled_buckets(
    folders: Sequence[str], number: int, num_buckets: int, dtype: np.dtype[Any]
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]]:
    """Tokens and sizes of one bucket after another, of all shards together, each in its final order."""
    for bucket in range(num_buckets):
        names = bucket_names(number, bucket)
        there = [folder for folder in folders if Path(folder, names[0]).exists()]
        if not there:
            continue
        tokens = np.concatenate([np.fromfile(Path(folder, names[0]), dtype) for folder in there])
        entries = np.concatenate([np.fromfile(Path(folder, names[1]), ENTRY) for folder in there])
        order = np.argsort(entries["order"], kind="stable")
        sizes = entries["size"].astype(np.int32)
        yield gather(tokens, sizes, order), sizes[order]
