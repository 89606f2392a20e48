"""Joins `.bin`/`.idx` pairs into one, by copying: nothing is decoded, and nothing grows with the size of the data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.header import MAGIC, PREAMBLE, VERSION, dtype_code
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter
from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import close_durably

_COPY_BYTES = 1 << 24
_TABLE_BLOCK = 1 << 20  # entries of an index table that are moved at a time


def merge_datasets(
    prefixes: Sequence[str],
    output_prefix: str,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> IndexedDataset:
    """Write the documents of several data sets, one after the other, as one.

    Byte for byte what megatron-core's `IndexedDatasetBuilder.add_index` makes of the same pairs in the same order.
    Offsets are 64 bits wide throughout, so the result may have more than 2^31 tokens, sequences or documents.

    Args:
        prefixes: what to join, in this order.
        output_prefix: writes its `.bin` and `.idx`; aside first, published by rename.
        overwrite: whether an existing pair may be replaced.
        progress: called with the bytes of each piece of a `.bin` that was copied.

    Returns:
        The new data set.

    Raises:
        UserError: a file is missing, there is nothing to join, the types differ, or the output is there or is an input.
        RefusedError: an input is damaged.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    _check_inputs(datasets)
    require_free(output_prefix, prefixes, overwrite=overwrite)
    writer = _MergeWriter(output_prefix, datasets[0].dtype)
    with writer:
        for dataset in datasets:
            writer.append(dataset, progress)
    return IndexedDataset(output_prefix)


def folder_prefixes(folder: str | os.PathLike[str]) -> list[str]:
    """The data sets in a folder, in the order of their names: what Megatron-LM's merge_datasets.py joins.

    Raises:
        UserError: there is no such folder, it holds none, or a file lacks its other half.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the .bin/.idx pairs")
    names = {file.with_suffix("") for file in path.iterdir() if file.is_file() and file.suffix in (".bin", ".idx")}
    halves = [f"{name}{end}" for name in names for end in (".bin", ".idx") if not Path(f"{name}{end}").is_file()]
    if halves:
        raise UserError(f"{folder}: no such file: {', '.join(sorted(halves))}; a data set is a pair of .bin and .idx")
    if not names:
        raise UserError(f"{folder}: holds no .bin/.idx pair")
    return sorted(map(str, names))


def require_free(output_prefix: str, inputs: Sequence[str], *, overwrite: bool) -> None:
    """Refuse an output that is one of the inputs, or that is there and may not be replaced.

    Raises:
        UserError: it is so.
    """
    present = [f"{output_prefix}{end}" for end in (".bin", ".idx") if os.path.exists(f"{output_prefix}{end}")]
    if any(os.path.realpath(f"{output_prefix}.bin") == os.path.realpath(f"{prefix}.bin") for prefix in inputs):
        raise UserError(f"{output_prefix}: is an input too; choose another output")
    if present and not overwrite:
        raise UserError(
            f"{' and '.join(present)}: there already; choose another output, or replace it with --overwrite"
        )


def _check_inputs(datasets: Sequence[IndexedDataset]) -> None:
    if not datasets:
        raise UserError("no data set is given; name at least one prefix of .bin/.idx")
    first = datasets[0]
    for dataset in datasets:
        if dataset.dtype != first.dtype:
            raise UserError(
                f"{dataset.prefix}: has {dataset.dtype.name} tokens, {first.prefix} has {first.dtype.name}; they were "
                "made with other vocabularies: build one of them anew with `megatron-cpt preprocess`"
            )
        if dataset.header.has_modes != first.header.has_modes:
            raise UserError(
                f"{dataset.prefix} and {first.prefix}: one is multimodal and one is not; they cannot be joined"
            )


class _MergeWriter(IndexedDatasetWriter):
    """The writer, with an index copied from other indices; how the pair is published stays the same."""

    def __init__(self, prefix: str, dtype: np.dtype[np.generic]) -> None:
        super().__init__(prefix, dtype)
        self._datasets: list[IndexedDataset] = []

    def append(self, dataset: IndexedDataset, progress: Callable[[int], None] | None) -> None:
        """Copy a `.bin`; remember whose index to copy."""
        assert self._bin is not None
        self._datasets.append(dataset)
        with open(f"{dataset.prefix}.bin", "rb") as source:
            while piece := source.read(_COPY_BYTES):
                self._bin.write(piece)
                if progress is not None:
                    progress(len(piece))

    def _write_index(self) -> None:
        """The tables of all inputs one after another; pointers and boundaries move by what stands before them."""
        num_sequences = sum(dataset.num_sequences for dataset in self._datasets)
        num_documents = sum(dataset.num_documents for dataset in self._datasets)
        with open(self._temporary["idx"], "wb") as idx:
            idx.write(PREAMBLE.pack(MAGIC, VERSION, dtype_code(self.dtype), num_sequences, num_documents + 1))
            for dataset in self._datasets:
                _copy_table(idx, dataset.sizes, 0)
            moved = 0
            for dataset in self._datasets:
                _copy_table(idx, dataset.sequence_pointers, moved)
                moved += dataset.num_tokens * self.dtype.itemsize
            idx.write(np.zeros(1, "<i8").tobytes())
            moved = 0
            for dataset in self._datasets:
                _copy_table(idx, dataset.document_indices[1:], moved)
                moved += dataset.num_sequences
            for dataset in self._datasets:
                if dataset.header.has_modes:
                    _copy_modes(idx, dataset)
            close_durably(idx)


def _copy_table(idx: IO[bytes], table: npt.NDArray[np.int32] | npt.NDArray[np.int64], moved: int) -> None:
    for start in range(0, len(table), _TABLE_BLOCK):
        block = table[start : start + _TABLE_BLOCK]
        idx.write(np.add(block, moved, dtype=block.dtype).tobytes())


def _copy_modes(idx: IO[bytes], dataset: IndexedDataset) -> None:
    with open(f"{dataset.prefix}.idx", "rb") as source:
        source.seek(dataset.header.modes_offset)
        shutil.copyfileobj(source, idx)
