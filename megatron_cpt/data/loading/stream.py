"""Source as an endless stream of samples that can be entered anywhere.

Sample k is a pure function of (seed, source name, k) and of the token files, so one counter is the whole state of a
source. Each epoch reads every span of seq_length tokens exactly once, in its own order and at its own grid offset.

Example: one file of 100 tokens, seq_length 16. The last token is only ever a label, so 99 // 16 = 6 spans fit, and
99 - 6 * 16 = 3 tokens are left over: the grid starts at token 0, 1, 2 or 3, drawn per epoch. Sample 13 is in epoch
13 // 6 = 2, at place 13 % 6 = 1 of that epoch's order. If the order has span 4 there and the grid starts at token 2,
then sample 13 starts at token 2 + 4 * 16 = 66 and is tokens 66 to 82: 16 inputs, and one more as the last label.

Phases may read a source in shorter samples. Spans keep the longest length, and a shorter sample is a part of a span.
In the example a span has 4 parts of 4 tokens. The parts of a window (spans that follow each other in the epoch's order,
see `sampling/spans.py`) are shuffled together. If a window had 3 spans, samples 0 to 11 are the 12 parts of the spans
at places 0 to 2 of the order, and samples 12 to 23 the parts of those at places 3 to 5.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.loading.fim import FillInMiddle
from megatron_cpt.data.tokenfile.listed_documents import open_source
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.sampling.permutation import Permutation, derive_key
from megatron_cpt.sampling.spans import SpanGrid


class SampleLocation(NamedTuple):
    """Position of a sample in the files of its source.

    Attributes:
        sample_index: index of the sample in the source, from 0, counted over all epochs in samples of its length.
        epoch: number of the epoch, from 0.
        span: index of the span over all files of the source.
        file: index of the file in the source.
        token_offset: offset of the sample's first token in the `.bin`, in tokens.
        seq_length: tokens that the sample trains on.
    """

    source: str
    sample_index: int
    epoch: int
    span: int
    file: int
    prefix: str
    token_offset: int
    seq_length: int


@dataclass(frozen=True)
class _Epoch:
    """Order of the spans in one epoch, and the grid offset of each file that was read in it."""

    number: int
    order: Permutation
    grid_offsets: dict[int, int] = field(default_factory=dict)


class TokenStream:
    """Endless stream of the samples of one source.

    A file of T tokens has n = (T - 1) // seq_length spans. The T - 1 - n * seq_length tokens that are left over let the
    grid start at another offset in each epoch, so that other tokens are skipped and samples start at other places.

    Example:
        >>> web = cpt.TokenStream.open("web", "data/web", seq_length=4096, seed=1234)
        >>> web[10_000_000].shape  # any sample, without reading earlier samples
        (4097,)
        >>> web.locate(10_000_000).epoch
        3

    Args:
        name: the source's name; part of the random key, so that two sources over the same files differ.
        datasets: the source's files, in a fixed order.
        seq_length: tokens per span. Samples train on so many tokens, or on a divisor of it, and have one more token as
            the last label.
        seed: the run's seed.
        fim: fill-in-the-middle, applied to every sample after it was read; None: samples stay unchanged.

    Attributes:
        dtype: integer type that can hold all tokens of the source.
        samples_per_epoch: spans in all files.

    Raises:
        UserError: no file has seq_length + 1 tokens.
        RefusedError: the token type of a file is not an integer.
    """

    def __init__(
        self,
        name: str,
        datasets: Sequence[IndexedDataset],
        *,
        seq_length: int,
        seed: int,
        fim: FillInMiddle | None = None,
    ) -> None:
        self.name = name
        self.fim = fim
        self.datasets = tuple(datasets)
        self.seq_length = seq_length
        self.seed = seed
        for dataset in self.datasets:
            if dataset.dtype.kind not in "iu":
                raise RefusedError(
                    f"{dataset.prefix}.idx: source {name}: the token type is {dataset.dtype.name}, but token ids are "
                    "integers; give a token file that was built with `megatron-cpt preprocess`"
                )
        spans = [max(0, dataset.num_tokens - 1) // seq_length for dataset in self.datasets]
        self._cumulative_spans = list(accumulate(spans))  # spans in files 0 to i
        self.num_tokens = sum(dataset.num_tokens for dataset in self.datasets)
        self.samples_per_epoch = sum(spans)
        self.grid = SpanGrid(seq_length, self.samples_per_epoch)
        if self.samples_per_epoch == 0:
            raise UserError(
                f"source {name}: {self.num_tokens} tokens in {len(self.datasets)} file(s) are too few for one sample "
                f"of seq_length + 1 = {seq_length + 1} tokens in one file; give it more data or remove it"
            )
        added = [] if fim is None else [fim.dtype]
        self.dtype = np.result_type(*(dataset.dtype for dataset in self.datasets), *added)
        self._cached_epoch: _Epoch | None = None
        self._cached_window: tuple[tuple[int, int, int], Permutation] | None = None

    @classmethod
    def open(
        cls, name: str, prefixes: str | list[str], *, seq_length: int, seed: int, fim: FillInMiddle | None = None
    ) -> TokenStream:
        """Open the files of a source; other arguments as for `TokenStream`.

        Args:
            prefixes: path of a .bin/.idx pair without its ending, a glob such as `data/web-*`, a document list
                `NAME.docs`, or a list of these.

        Raises:
            UserError: a file is missing, or no file has seq_length + 1 tokens.
            RefusedError: a file is damaged.
        """
        if type(seq_length) is not int or seq_length < 1:
            raise UserError(f"seq_length: {seq_length!r}; give a whole number of at least 1")
        return cls(name, open_source(prefixes), seq_length=seq_length, seed=seed, fim=fim)

    def __getitem__(self, sample_index: int) -> npt.NDArray[Any]:
        """Return the seq_length + 1 token ids of a sample; see `read`."""
        return self.read(sample_index)

    def __repr__(self) -> str:
        return f"TokenStream({self.name!r}: {self.samples_per_epoch} samples of {self.seq_length} tokens per epoch)"

    def locate(self, sample_index: int, seq_length: int | None = None) -> SampleLocation:
        """Return the position of a sample, without touching a file.

        Args:
            sample_index: index of the sample, from 0, counted over all epochs in samples of this length.
            seq_length: tokens that the sample trains on, a divisor of the stream's own; None: the stream's own.

        Raises:
            IndexError: `sample_index` is negative.
        """
        if sample_index < 0:
            raise IndexError(f"source {self.name}: sample {sample_index}; the first is 0")
        length = seq_length or self.seq_length
        assert self.seq_length % length == 0, f"samples of {length} tokens do not fill spans of {self.seq_length}"
        if length == self.seq_length:
            epoch_number, place = divmod(int(sample_index), self.samples_per_epoch)
            part = 0
        else:
            epoch_number, place, part = self._find_part(int(sample_index), length)
        epoch = self._epoch(epoch_number)
        span = epoch.order(place)
        file = bisect_right(self._cumulative_spans, span)
        span_in_file = span - (self._cumulative_spans[file - 1] if file else 0)
        token_offset = self._grid_offset(file, epoch) + self.seq_length * span_in_file + length * part
        prefix = self.datasets[file].prefix
        return SampleLocation(self.name, int(sample_index), epoch_number, span, file, prefix, token_offset, length)

    def read(self, sample_index: int, seq_length: int | None = None) -> npt.NDArray[Any]:
        """Return the seq_length + 1 tokens of a sample, after fill-in-the-middle; see `read_plain`."""
        return self.apply_fim(self.read_plain(sample_index, seq_length), sample_index, seq_length)

    def read_plain(self, sample_index: int, seq_length: int | None = None) -> npt.NDArray[Any]:
        """Return the tokens of a sample before fill-in-the-middle: one contiguous read; arguments as for `locate`.

        Raises:
            IndexError: `sample_index` is negative.
            RefusedError: the file became shorter since it was opened.
        """
        location = self.locate(sample_index, seq_length)
        return self.datasets[location.file].read(location.token_offset, location.seq_length + 1)

    def apply_fim(self, tokens: npt.NDArray[Any], sample_index: int, seq_length: int | None = None) -> npt.NDArray[Any]:
        """Apply fill-in-the-middle, if the stream has it, to the plain tokens of a sample."""
        if self.fim is None:
            return tokens
        shorter = [] if seq_length is None or seq_length == self.seq_length else [seq_length]
        return self.fim.apply(tokens, derive_key(self.seed, self.name, "fim", int(sample_index), *shorter))

    def _find_part(self, sample_index: int, length: int) -> tuple[int, int, int]:
        """Return a shorter sample's epoch, the place of its span in the epoch's order, and its part of the span."""
        parts, window_spans = self.grid.parts(length), self.grid.window_spans
        epoch, index_in_epoch = divmod(sample_index, self.samples_per_epoch * parts)
        window, index_in_window = divmod(index_in_epoch, window_spans * parts)
        if self._cached_window is None or self._cached_window[0] != (epoch, window, length):
            spans = min(window_spans, self.samples_per_epoch - window * window_spans)
            key = derive_key(self.seed, self.name, epoch, "window", window, length)
            self._cached_window = (epoch, window, length), Permutation(spans * parts, key)
        span_in_window, part = divmod(self._cached_window[1](index_in_window), parts)
        return epoch, window * window_spans + span_in_window, part

    def _epoch(self, number: int) -> _Epoch:
        epoch = self._cached_epoch
        if epoch is None or epoch.number != number:
            order = Permutation(self.samples_per_epoch, derive_key(self.seed, self.name, number))
            self._cached_epoch = epoch = _Epoch(number, order)
        return epoch

    def _grid_offset(self, file: int, epoch: _Epoch) -> int:
        """Return the token at which a file's grid starts in this epoch, uniform over the tokens that are left over."""
        if file not in epoch.grid_offsets:
            left_over = (self.datasets[file].num_tokens - 1) % self.seq_length
            key = derive_key(self.seed, self.name, epoch.number, "shift", file)
            epoch.grid_offsets[file] = key % (left_over + 1)
        return epoch.grid_offsets[file]
