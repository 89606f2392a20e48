"""Sinks that append encoded documents to the work folder: in input order, or in buckets for a shuffle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.preprocess.inputs import Block
from megatron_cpt.data.preprocess.work_folder import WorkFolder
from megatron_cpt.data.preprocess.workers import EncodedTexts
from megatron_cpt.files.whole_io import exists, read_whole_array

BUCKET_BYTES = 1 << 28  # of text per bucket; each bucket is shuffled in memory
MAX_BUCKETS = 1 << 12
_MAX_BUFFERED = 1 << 28  # bytes over all buckets

ENTRY = np.dtype([("order", "<u8"), ("size", "<i4")])
"""Record per document of a bucket: its random key, by which the bucket is sorted, and its number of tokens."""


class OrderedSink:
    """Sink for documents in input order: files `N.tokens` and `N.sizes` for key number N."""

    def __init__(self, folder: WorkFolder, number: int) -> None:
        self._folder = folder
        self._tokens, self._sizes = ordered_names(number)

    def add(self, block: Block, texts: EncodedTexts) -> None:
        """Add the documents of the next block."""
        if texts.lengths.size:
            self._folder.append(self._tokens, np.ascontiguousarray(texts.tokens).data)
            self._folder.append(self._sizes, texts.lengths.astype("<i4").data)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""


class ShuffledSink:
    """Sink that deals documents into buckets by a random 64-bit key; sorting each bucket completes the shuffle.

    The key follows from the seed and the document's place in the input, so workers, shards and restarts do not change
    the order. The highest bits choose the bucket: with 4 buckets, the keys 0b00... go to bucket 0 and 0b11... to bucket
    3, so the sorted buckets one after another are all documents sorted by key.

    Args:
        number: number of the key in the list of keys.
        num_buckets: a power of two.
    """

    def __init__(self, folder: WorkFolder, number: int, seed: int, num_buckets: int) -> None:
        self._folder = folder
        self._number = number
        self._seed = seed
        self._shift = 64 - num_buckets.bit_length() + 1
        self._buffer: dict[int, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = {}
        self._buffered_bytes = 0

    def add(self, block: Block, texts: EncodedTexts) -> None:
        """Add the documents of the next block."""
        order = np.random.PCG64([self._seed, block.file, block.position]).random_raw(texts.lengths.size)
        buckets = (order >> np.uint64(self._shift)).astype(np.int64) if self._shift < 64 else np.zeros(order.size, int)
        entries = np.empty(order.size, ENTRY)
        entries["order"], entries["size"] = order, texts.lengths
        # Group by bucket first, so that each bucket takes its documents of this block with one slice.
        grouped = np.argsort(buckets, kind="stable")
        tokens = gather(texts.tokens, texts.lengths, grouped)
        entries = entries[grouped]
        ends = np.cumsum(entries["size"], dtype=np.int64)
        bounds = [*np.flatnonzero(np.diff(buckets[grouped], prepend=-1)).tolist(), order.size]
        for first, last in itertools.pairwise(bounds):
            begin = int(ends[first - 1]) if first else 0
            part = (tokens[begin : int(ends[last - 1])], entries[first:last])
            self._buffer.setdefault(int(buckets[grouped[first]]), []).append(part)
        self._buffered_bytes += tokens.nbytes + entries.nbytes
        if self._buffered_bytes > _MAX_BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Append everything buffered to the folder's files."""
        for bucket, parts in self._buffer.items():
            tokens_name, entries_name = bucket_names(self._number, bucket)
            self._folder.append(tokens_name, np.concatenate([tokens for tokens, _ in parts]).data)
            self._folder.append(entries_name, np.concatenate([entries for _, entries in parts]).tobytes())
        self._buffer.clear()
        self._buffered_bytes = 0


def ordered_names(number: int) -> tuple[str, str]:
    """Return the names of the files of tokens and of sizes of key number `number`."""
    return f"{number}.tokens", f"{number}.sizes"


def bucket_names(number: int, bucket: int) -> tuple[str, str]:
    """Return the names of the files of tokens and of entries of a bucket."""
    return f"{number}.{bucket:04}.tokens", f"{number}.{bucket:04}.entries"


def count_buckets(text_bytes: int) -> int:
    """Return the number of buckets, a power of two, for so much text."""
    wanted = -(-text_bytes // BUCKET_BYTES)
    return min(MAX_BUCKETS, 1 << max(0, wanted - 1).bit_length())


def gather(tokens: npt.NDArray[Any], sizes: npt.NDArray[Any], chosen: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return the tokens of documents in another order.

    Example: tokens [1, 2, 3, 4, 5] of documents with sizes [2, 3], chosen [1, 0]: [3, 4, 5, 1, 2].

    Args:
        chosen: numbers of the wanted documents, in the new order.
    """
    begins = np.cumsum(sizes, dtype=np.int64) - sizes
    lengths = sizes[chosen].astype(np.int64)
    shift = begins[chosen] - (np.cumsum(lengths) - lengths)  # old place of a token minus its new place
    reordered: npt.NDArray[Any] = tokens[np.arange(int(lengths.sum())) + np.repeat(shift, lengths)]
    return reordered


def shuffled_buckets(
    folders: Sequence[str], number: int, num_buckets: int, dtype: np.dtype[Any]
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int32]]]:
    """Yield tokens and sizes bucket by bucket, over all shards, each bucket in its final order."""
    for bucket in range(num_buckets):
        names = bucket_names(number, bucket)
        present = [folder for folder in folders if exists(Path(folder, names[0]))]
        if not present:
            continue
        tokens = np.concatenate([read_whole_array(Path(folder, names[0]), dtype) for folder in present])
        entries = np.concatenate([read_whole_array(Path(folder, names[1]), ENTRY) for folder in present])
        order = np.argsort(entries["order"], kind="stable")
        sizes = entries["size"].astype(np.int32)
        yield gather(tokens, sizes, order), sizes[order]
