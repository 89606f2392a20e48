"""Merge of `.bin`/`.idx` pairs into one. Files are copied without decoding, in constant memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from megatron_cpt.data.tokenfile.header import MAGIC, PREAMBLE, VERSION, dtype_code
from megatron_cpt.data.tokenfile.numbers import NumberTable
from megatron_cpt.data.tokenfile.reader import IndexedDataset, join_tokenizers, open_with_one_dtype
from megatron_cpt.data.tokenfile.sidecar import Origin
from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter, require_free
from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import close_durably
from megatron_cpt.files.whole_io import DiskFile, open_writer

_COPY_BYTES = 1 << 24
_TABLE_BLOCK = 1 << 20  # entries of an index table that are copied at a time


def merge_datasets(
    prefixes: Sequence[str],
    output_prefix: str,
    *,
    overwrite: bool = False,
    allow_mixed_tokenizers: bool = False,
    progress: Callable[[int], None] | None = None,
) -> IndexedDataset:
    """Write the documents of several datasets, one dataset after the other, as one dataset.

    The result is byte for byte equal to what megatron-core's `IndexedDatasetBuilder.add_index` makes of the same pairs
    in the same order. Offsets have 64 bits, so there may be more than 2^31 tokens, sequences or documents.

    Args:
        output_prefix: prefix of the new `.bin` and `.idx`; they get this name only when they are complete.
        allow_mixed_tokenizers: join datasets although their sidecars name different tokenizers.
        progress: called with the number of bytes after each piece of a `.bin` was copied.

    Raises:
        UserError: no dataset is given, a file is missing, token types differ, or the output exists or is an input.
        RefusedError: an input is damaged, or the tokenizers differ.
    """
    datasets = open_with_one_dtype(prefixes)
    first = datasets[0]
    for dataset in datasets:
        if dataset.header.has_modes != first.header.has_modes:
            raise UserError(
                f"{dataset.prefix} and {first.prefix}: one is multimodal and one is not; they cannot be merged"
            )
    require_free(output_prefix, prefixes, overwrite=overwrite)
    origin = join_tokenizers(datasets, "merge", {}, allow_mixed=allow_mixed_tokenizers)
    with _MergeWriter(output_prefix, first.dtype, origin=origin) as writer:
        for dataset in datasets:
            writer.append(dataset, progress)
    return IndexedDataset(output_prefix)


def folder_prefixes(folder: str | os.PathLike[str]) -> list[str]:
    """Return the datasets in a folder, sorted by name: the inputs of Megatron-LM's merge_datasets.py.

    Raises:
        UserError: the folder does not exist, has no dataset, or has one file of a pair without the other.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of the .bin/.idx pairs")
    prefixes = {file.with_suffix("") for file in path.iterdir() if file.is_file() and file.suffix in (".bin", ".idx")}
    paths = [Path(f"{prefix}{end}") for prefix in prefixes for end in (".bin", ".idx")]
    missing = sorted(str(path) for path in paths if not path.is_file())
    if missing:
        raise UserError(f"{folder}: no such file: {', '.join(missing)}; a dataset is a pair of .bin and .idx")
    if not prefixes:
        raise UserError(f"{folder}: contains no .bin/.idx pair; give the folder of the pairs")
    return sorted(map(str, prefixes))


class _MergeWriter(IndexedDatasetWriter):
    """Dataset writer that copies whole datasets, including their index tables."""

    def __init__(self, prefix: str, dtype: np.dtype[np.generic], *, origin: Origin) -> None:
        super().__init__(prefix, dtype, origin=origin)
        self._datasets: list[IndexedDataset] = []

    def append(self, dataset: IndexedDataset, progress: Callable[[int], None] | None) -> None:
        """Copy the `.bin` of a dataset; its index is copied when the writer closes."""
        self._datasets.append(dataset)
        with DiskFile(f"{dataset.prefix}.bin") as source:
            while piece := source.read(_COPY_BYTES):
                self._write_tokens(piece)
                if progress is not None:
                    progress(len(piece))

    def _write_index(self) -> None:
        """Write each table of all datasets, with pointers and document boundaries moved.

        Example: if the first dataset has 3 sequences and 10 uint16 tokens, all sequence pointers of the second one
        grow by 20 bytes, and all its document boundaries by 3.
        """
        num_sequences = sum(dataset.num_sequences for dataset in self._datasets)
        num_documents = sum(dataset.num_documents for dataset in self._datasets)
        with open_writer(self._temporary["idx"]) as idx:
            idx.write(PREAMBLE.pack(MAGIC, VERSION, dtype_code(self.dtype), num_sequences, num_documents + 1))
            for dataset in self._datasets:
                _copy_table(idx, dataset.sizes, 0)
            bytes_before = 0
            for dataset in self._datasets:
                _copy_table(idx, dataset.sequence_pointers, bytes_before)
                bytes_before += dataset.num_tokens * self.dtype.itemsize
            idx.write(np.zeros(1, "<i8").tobytes())
            sequences_before = 0
            for dataset in self._datasets:
                _copy_table(idx, dataset.document_indices, sequences_before, first=1)
                sequences_before += dataset.num_sequences
            for dataset in self._datasets:
                if dataset.header.has_modes:
                    with DiskFile(f"{dataset.prefix}.idx") as source:
                        idx.write(source.read_at(dataset.header.modes_offset, dataset.num_sequences))
            close_durably(idx)


def _copy_table(idx: IO[bytes], table: NumberTable, added: int, first: int = 0) -> None:
    for start in range(first, len(table), _TABLE_BLOCK):
        block = table[start : start + _TABLE_BLOCK]
        idx.write(np.add(block, added, dtype=block.dtype).tobytes())
