"""Assemble `.bin`/`.idx` pairs from finished work folders.

A run's own file of tokens becomes the `.bin` by a rename. When shards are joined or the output is split, the kernel
copies the tokens once (`copy_file_range`; file systems that share blocks copy nothing). A shuffle reorders them in
memory, bucket by bucket.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.preprocess.buckets import ordered_names, shuffled_buckets
from megatron_cpt.data.tokenfile.numbers import NumberTable
from megatron_cpt.data.tokenfile.sidecar import Origin, describe_pair, is_free, sidecar_path
from megatron_cpt.data.tokenfile.writer import write_index
from megatron_cpt.files.atomic import Rename, close_durably, write_atomically
from megatron_cpt.files.whole_io import DiskFile, exists, open_writer

_DOCUMENTS_PER_COPY = 1 << 20
_COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class OutputLayout:
    """Layout of the datasets that a run makes, one per key.

    Attributes:
        num_buckets: buckets of a shuffled run; None: documents keep their order.
        split_tokens: most tokens of a pair, unless a single document has more; None: one pair per key.
    """

    prefixes: list[str]
    dtype: np.dtype[Any]
    num_buckets: int | None = None
    split_tokens: int | None = None


def make_pairs(
    layout: OutputLayout, origin: Origin | None, sources: Sequence[str], folder: str
) -> tuple[list[Rename], list[str]]:
    """Write all pairs of the datasets, and their sidecars, under temporary names in a work folder.

    Args:
        origin: facts for the sidecars; None: there are none.
        sources: work folders of the shards, in order.
        folder: the folder to write to; may be one of `sources`.

    Returns:
        The renames that publish the pairs, in order, and the prefixes of the published datasets.
    """
    renames: list[Rename] = []
    prefixes: list[str] = []
    for number, prefix in enumerate(layout.prefixes):
        if layout.num_buckets is None and layout.split_tokens is None and list(sources) == [folder]:
            tokens_name, sizes_name = ordered_names(number)
            for name in (tokens_name, sizes_name):
                Path(folder, name).touch()
            _write_index(folder, sizes_name, f"{number}.idx", layout)
            pairs = [(tokens_name, f"{number}.idx", prefix)]
        else:
            with contextlib.closing(_SplitOutput(layout, number, folder)) as output:
                if layout.num_buckets is None:
                    for sizes, write in _ordered_parts(sources, number, layout.dtype):
                        output.add(sizes, write)
                else:
                    for tokens, sizes in shuffled_buckets(sources, number, layout.num_buckets, layout.dtype):
                        output.add(sizes, functools.partial(_write_tokens, tokens))
            pairs = output.finish()
        for bin_name, idx_name, target in pairs:
            bin_path, idx_path = os.path.join(folder, bin_name), os.path.join(folder, idx_name)
            renames.append((bin_path, f"{target}.bin"))
            if origin is not None and is_free(target):
                path = Path(idx_path).with_suffix(".json")
                write_atomically(path, describe_pair(bin_path, idx_path, origin).to_json())
                renames.append((str(path), sidecar_path(target)))
            renames.append((idx_path, f"{target}.idx"))
            prefixes.append(target)
    return renames, prefixes


def _write_index(folder: str, sizes_name: str, idx_name: str, layout: OutputLayout) -> None:
    path = os.path.join(folder, sizes_name)
    sizes = NumberTable.of(path, "<i4")
    write_index(os.path.join(folder, idx_name), sizes, layout.dtype, empty_sequences=False)


Write = Callable[[DiskFile, int, int], None]
"""write(file, first, last) appends the tokens [first, last) of a part of the input to a file."""


def _ordered_parts(sources: Sequence[str], number: int, dtype: np.dtype[Any]) -> Iterator[tuple[Any, Write]]:
    for source in sources:
        tokens_path, sizes_path = (os.path.join(source, name) for name in ordered_names(number))
        if not exists(sizes_path) or os.path.getsize(sizes_path) == 0:
            continue
        sizes = NumberTable.of(sizes_path, "<i4")
        with DiskFile(tokens_path) as file:
            at = 0
            for block in range(0, len(sizes), _DOCUMENTS_PER_COPY):
                part = sizes[block : block + _DOCUMENTS_PER_COPY]
                yield part, functools.partial(_copy_tokens, file, at, dtype.itemsize)
                at += int(part.sum(dtype=np.int64)) * dtype.itemsize


def _copy_tokens(source: DiskFile, offset: int, itemsize: int, target: DiskFile, first: int, last: int) -> None:
    at, end = offset + first * itemsize, offset + last * itemsize
    while at < end:
        count = min(end - at, _COPY_BYTES)
        try:
            copied = os.copy_file_range(source.fileno(), target.fileno(), count, offset_src=at)
        except OSError:  # not supported by this file system, or a failing disk
            copied = target.write(source.read_at(at, count))
        if copied == 0:
            raise OSError(errno.ENODATA, "is shorter than the sum of its sizes", source.name)
        at += copied


def _write_tokens(tokens: npt.NDArray[Any], target: DiskFile, first: int, last: int) -> None:
    target.write(tokens[first:last].data)


class _SplitOutput:
    """Writer of one pair after another, each of at most `split_tokens` tokens."""

    def __init__(self, layout: OutputLayout, number: int, folder: str) -> None:
        self._layout, self._number, self._folder = layout, number, folder
        self._num_pairs = 0
        self._tokens = 0  # in the open pair
        self._files: list[Any] = []
        self._open()

    def add(self, sizes: npt.NDArray[np.int32], write: Write) -> None:
        """Append documents of these sizes, whose tokens `write` copies."""
        ends = np.cumsum(sizes, dtype=np.int64)
        first, begin = 0, 0
        while first < sizes.size:
            last, limit = sizes.size, self._layout.split_tokens
            if limit is not None:
                last = int(np.searchsorted(ends, begin + limit - self._tokens, side="right"))
            if last <= first and self._tokens > 0:
                self._open()
                continue
            last = max(last, first + 1)  # a document larger than a pair gets a pair of its own
            end = int(ends[last - 1])
            write(self._files[0], begin, end)
            self._files[1].write(np.ascontiguousarray(sizes[first:last]).astype("<i4").tobytes())
            self._tokens += end - begin
            first, begin = last, end

    def finish(self) -> list[tuple[str, str, str]]:
        """Write the `.idx` files; return (name of the .bin, name of the .idx, final prefix) per pair."""
        pairs, prefix = [], self._layout.prefixes[self._number]
        for pair in range(self._num_pairs):
            bin_name, sizes_name, idx_name = self._names(pair)
            _write_index(self._folder, sizes_name, idx_name, self._layout)
            pairs.append((bin_name, idx_name, prefix if self._layout.split_tokens is None else f"{prefix}-{pair:05}"))
        return pairs

    def close(self) -> None:
        """Close the open pair once it is on the disk."""
        for file in self._files:
            close_durably(file)
        self._files = []

    def _open(self) -> None:
        self.close()
        bin_name, sizes_name, _ = self._names(self._num_pairs)
        # unbuffered: the kernel copies into the file without Python's knowledge
        self._files.append(DiskFile(os.path.join(self._folder, bin_name), "wb"))
        self._files.append(open_writer(os.path.join(self._folder, sizes_name)))
        self._tokens = 0
        self._num_pairs += 1

    def _names(self, pair: int) -> tuple[str, str, str]:
        stem = f"out.{self._number}.{pair:05}"
        return f"{stem}.bin", f"{stem}.sizes", f"{stem}.idx"
