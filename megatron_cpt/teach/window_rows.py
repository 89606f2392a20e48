"""Windows of a token file as rows of the teacher's forward pass, and their logits as records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.teacher_cache.cache_header import CacheHeader
from megatron_cpt.data.teacher_cache.top_k_records import Records, record_seeds
from megatron_cpt.data.tokenfile.documents import document_ends
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError
from megatron_cpt.evaluate.row_forward import Row, masked_segments
from megatron_cpt.evaluate.vocabulary_parallel import most_likely, own_logits

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WindowGroup:
    """Consecutive windows of one file that are one forward pass.

    The groups of a file depend on the file and the group size only. So a record has the same bits for every number of
    replicas, and also if `teach` was interrupted.

    Attributes:
        file: index of the file in the cache.
        first: index of the first window.
        stop: index after the last window.
    """

    file: int
    first: int
    stop: int


@dataclass(frozen=True)
class GivenRecords:
    """Records of one group.

    Attributes:
        start: position of the first one in its file.
        records: of consecutive positions.
        is_finite: False if a logit of the teacher is NaN or infinite.
    """

    file: int
    start: int
    records: Records
    is_finite: bool


@dataclass(frozen=True)
class WindowRows:
    """Builder of the rows of a cache.

    Attributes:
        header: of the cache.
        datasets: the token files, in the order of the header.
        documents: treatment of document boundaries.
        group_size: windows per row.
        multiple: row lengths are padded to a multiple of this.
    """

    header: CacheHeader
    datasets: tuple[IndexedDataset, ...]
    documents: DocumentOptions
    group_size: int
    multiple: int

    def num_groups(self, file: int) -> int:
        """Return the number of groups of a file."""
        return -(-self.header.grid(file).num_windows // self.group_size)

    def group(self, file: int, number: int) -> WindowGroup:
        """Return a group of a file."""
        first = number * self.group_size
        return WindowGroup(file, first, min(first + self.group_size, self.header.grid(file).num_windows))

    def row(self, group: WindowGroup, device: torch.device) -> Row[GivenRecords]:
        """Return the forward pass of a group.

        All rows have one length, so that the bits of a result do not depend on the position of a window in its file.

        Raises:
            RefusedError: the file is damaged, or has ids that the teacher does not know.
        """
        grid = self.header.grid(group.file)
        length = -(-self.group_size * self.header.window // self.multiple) * self.multiple
        tokens, positions, ends = np.zeros(length, np.int64), np.zeros(length, np.int64), np.arange(1, length + 1)
        start, stop = grid.gives(group.first, group.stop)
        selected = []
        for place, window in enumerate(range(group.first, group.stop)):
            at = place * self.header.window
            first, after = grid.reads(window)
            part = slice(at, at + after - first)
            tokens[part], positions[part], own_ends = self._window(group.file, first, after)
            ends[part] = own_ends + at
            given = grid.gives(window, window + 1)
            selected.append(np.arange(given[0], given[1]) - first + at)

        def collect(logits: torch.Tensor) -> GivenRecords:
            return self._records(group.file, start, logits)

        chosen = np.concatenate(selected)
        assert len(chosen) == stop - start
        inputs, places, given_places = (torch.from_numpy(array).to(device) for array in (tokens, positions, chosen))
        return Row(inputs, places, given_places, collect, masked_segments(ends, device))

    def _window(self, file: int, first: int, after: int) -> tuple[Ids, Ids, Ids]:
        """Return ids, positions, and for each token the index after the last one that may attend to it."""
        dataset, count = self.datasets[file], after - first
        tokens = dataset.read(first, count).astype(np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.header.vocab:
            bad = int(np.flatnonzero((tokens < 0) | (tokens >= self.header.vocab))[0])
            raise RefusedError(
                f"{dataset.prefix}.bin: token {first + bad}: id {int(tokens[bad])} is outside of the teacher's "
                f"vocabulary of {self.header.vocab:,}; choose a teacher with the tokenizer of the data"
            )
        positions, ends = np.arange(count), np.full(count, count)
        options = self.documents
        if options.reset_attention or options.reset_positions:
            is_end = document_ends(dataset, first, count)
            if options.eod_id is not None:
                is_end = is_end | (tokens == options.eod_id)
            is_end[-1] = True
            last = np.flatnonzero(is_end)
            sizes = np.diff(last, prepend=-1)
            if options.reset_attention:
                ends = np.repeat(last + 1, sizes)
            if options.reset_positions:
                positions = positions - np.repeat(last + 1 - sizes, sizes)
        return tokens, positions, ends

    def _records(self, file: int, start: int, logits: torch.Tensor) -> GivenRecords:
        found = most_likely(own_logits(logits, self.header.vocab), self.header.top_k)
        ids, log_probs, log_tail = (tensor.cpu().numpy() for tensor in found)
        seeds: npt.NDArray[Any] = record_seeds(self.header.key(file), start, len(ids))
        records = self.header.records.make(ids, log_probs, log_tail, seeds)
        is_finite = bool(np.isfinite(log_probs).all() and not np.isnan(log_tail).any())
        return GivenRecords(file, start, records, is_finite)
