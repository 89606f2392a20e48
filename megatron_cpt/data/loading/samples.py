"""Samples of several sources read together, and their ids compared with the vocabulary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError


def read_samples(
    streams: Sequence[TokenStream],
    sources: npt.NDArray[np.int64],
    ks: npt.NDArray[np.int64],
    vocab_size: int | None = None,
    seq_length: int | None = None,
) -> npt.NDArray[Any]:
    """Samples of streams, each file opened once to announce all of its samples and once to read them.

    The disk is told all of them before the first is read: one after the other, each would wait for the one before.

    Args:
        streams: one a source.
        sources: (n,), the place of each sample's stream in `streams`.
        ks: (n,), the number of each sample in its stream.
        vocab_size: refuse ids that are not below it; None: do not look.
        seq_length: tokens in each; left out: the streams' own.

    Returns:
        (n, seq_length + 1) ids in a type that holds those of all streams.

    Raises:
        RefusedError: the data is damaged or holds ids beyond the vocabulary.
    """
    wanted = list(zip(sources.tolist(), ks.tolist(), strict=True))
    rows_by_file: dict[IndexedDataset, list[tuple[int, int]]] = defaultdict(list)  # of each: token offset and row
    for row, (source, k) in enumerate(wanted):
        location = streams[source].locate(k, seq_length)
        rows_by_file[streams[source].datasets[location.file]].append((location.token_offset, row))
    width = (seq_length or streams[0].seq_length) + 1
    samples = np.empty((len(wanted), width), np.result_type(*(stream.dtype for stream in streams)))
    for dataset, places in rows_by_file.items():
        dataset.will_read([start for start, _ in places], width)
    for dataset, places in rows_by_file.items():
        _read_rows(dataset, places, samples)
    for row, (source, k) in enumerate(wanted):
        if streams[source].fim is not None:
            samples[row] = streams[source].rearrange(samples[row], k, seq_length)
    if vocab_size is not None and samples.size and (samples.max() >= vocab_size or samples.min() < 0):
        bad = int(np.flatnonzero(((samples >= vocab_size) | (samples < 0)).any(axis=1))[0])
        source, k = wanted[bad]
        raise _foreign_id(streams[source], k, vocab_size, seq_length)
    return samples


def _read_rows(dataset: IndexedDataset, places: Sequence[tuple[int, int]], samples: npt.NDArray[Any]) -> None:
    """Fill the rows of the samples that lie in one file."""
    starts, rows = [start for start, _ in places], [row for _, row in places]
    if dataset.dtype == samples.dtype:
        dataset.read_rows(starts, [samples[row] for row in rows])
    else:  # a narrower type than another source's
        narrow = np.empty((len(rows), samples.shape[1]), dataset.dtype)
        dataset.read_rows(starts, list(narrow))
        samples[rows] = narrow


def _foreign_id(stream: TokenStream, k: int, vocab_size: int, length: int | None) -> RefusedError:
    location, sample = stream.locate(k, length), stream.read_plain(k, length)
    place = int(np.flatnonzero((sample >= vocab_size) | (sample < 0))[0])
    token_offset = location.token_offset + place
    document = stream.datasets[location.file].document_at(token_offset)
    return RefusedError(
        f"source {stream.name}: {location.prefix}.bin: document {document}, token {token_offset} of the file "
        f"(sample {k}): id {int(sample[place])} is outside of the vocabulary of {vocab_size}; the data was made with "
        "another tokenizer or is damaged: `megatron-cpt check PREFIX --vocab-size N` looks at all of it"
    )
