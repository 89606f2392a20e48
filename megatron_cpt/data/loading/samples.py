"""Reading of many samples of several sources, with a check of their ids against the vocabulary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.data.tokenfile.documents import document_ends
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.remote import is_remote


def read_samples(
    streams: Sequence[TokenStream],
    sources: npt.NDArray[np.int64],
    sample_indices: npt.NDArray[np.int64],
    vocab_size: int | None = None,
    seq_length: int | None = None,
) -> npt.NDArray[Any]:
    """Read samples of several streams; each file is opened once to prefetch its samples and once to read them.

    All reads are announced before the first one starts, so that the disk serves them in parallel.

    Args:
        sources: (n,), index in `streams` per sample.
        sample_indices: (n,), index of each sample in its stream.
        vocab_size: ids must be below it; None: ids are not checked.
        seq_length: tokens that each sample trains on; None: the streams' own length.

    Returns:
        (n, seq_length + 1) ids, in an integer type that can hold the ids of all streams.

    Raises:
        RefusedError: a file is damaged, or has ids outside the vocabulary.
    """
    wanted = list(zip(sources.tolist(), sample_indices.tolist(), strict=True))
    reads_by_file: dict[IndexedDataset, list[tuple[int, int]]] = defaultdict(list)  # (token offset, row of the result)
    for row, (source, index) in enumerate(wanted):
        location = streams[source].locate(index, seq_length)
        reads_by_file[streams[source].datasets[location.file]].append((location.token_offset, row))
    width = (seq_length or streams[0].seq_length) + 1
    samples = np.empty((len(wanted), width), np.result_type(*(stream.dtype for stream in streams)))
    for dataset, reads in reads_by_file.items():
        dataset.will_read([start for start, _ in reads], [width] * len(reads))
    for dataset, reads in reads_by_file.items():
        starts, rows = [start for start, _ in reads], [row for _, row in reads]
        if dataset.dtype == samples.dtype:
            dataset.read_rows(starts, [samples[row] for row in rows])
        else:  # another source has a wider type
            narrow = np.empty((len(rows), width), dataset.dtype)
            dataset.read_rows(starts, list(narrow))
            samples[rows] = narrow
    for row, (source, index) in enumerate(wanted):
        if streams[source].fim is not None:
            samples[row] = streams[source].apply_fim(samples[row], index, seq_length)
    if vocab_size is not None and samples.size and (samples.max() >= vocab_size or samples.min() < 0):
        first_bad_row = int(np.flatnonzero(((samples >= vocab_size) | (samples < 0)).any(axis=1))[0])
        source, index = wanted[first_bad_row]
        raise _id_outside_vocabulary(streams[source], index, vocab_size, seq_length)
    return samples


def read_document_ends(
    streams: Sequence[TokenStream],
    sources: npt.NDArray[np.int64],
    sample_indices: npt.NDArray[np.int64],
    seq_length: int | None = None,
) -> npt.NDArray[np.bool_]:
    """Return which inputs of the samples end a document by the `.idx` of their file; arguments as for `read_samples`.

    Fill-in-the-middle moves tokens, so the rows of a source that has it are False: its documents end at the
    end-of-document ids, which stay at the end of their pieces.

    Returns:
        bool (n, seq_length).
    """
    length = seq_length or streams[0].seq_length
    ends = np.zeros((len(sources), length), np.bool_)
    used = dict[str, IndexedDataset]()
    for row, (source, index) in enumerate(zip(sources.tolist(), sample_indices.tolist(), strict=True)):
        stream = streams[source]
        if stream.fim is None:
            location = stream.locate(index, seq_length)
            dataset = used.setdefault(location.prefix, stream.datasets[location.file])
            ends[row] = document_ends(dataset, location.token_offset, length)
    for dataset in used.values():
        if not is_remote(dataset.prefix):  # there may be thousands of files, and a map keeps a descriptor open
            dataset.close()
    return ends


def _id_outside_vocabulary(stream: TokenStream, index: int, vocab_size: int, length: int | None) -> RefusedError:
    location, sample = stream.locate(index, length), stream.read_plain(index, length)
    position = int(np.flatnonzero((sample >= vocab_size) | (sample < 0))[0])
    token_offset = location.token_offset + position
    pair, offset, _ = next(stream.datasets[location.file].file_ranges(token_offset, 1))
    return RefusedError(
        f"source {stream.name}: {pair.prefix}.bin: document {pair.document_at(offset)}, token {offset} of the file "
        f"(sample {index}): id {int(sample[position])} is outside of the vocabulary of {vocab_size}; the data was made "
        "with another tokenizer or is damaged: run `megatron-cpt check PREFIX --vocab-size N` to find all such ids"
    )
