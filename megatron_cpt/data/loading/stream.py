"""A source as an endless stream of samples that can be entered anywhere.

Sample k is a pure function of (seed, source name, k) and of the token files, so the whole state of a source is one
counter. Each epoch reads every span of seq_length tokens exactly once, in an order and on a grid of its own.

Where phases differ in sequence length, the spans are as long as the longest samples, and shorter samples are parts of
them: the parts of a window of spans (`sampling/spans.py`), which follow each other in the epoch's order, in an
order of
the window's own. What k counts then are samples of the length that is asked for.
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
from megatron_cpt.data.tokenfile.reader import IndexedDataset, expand_prefixes
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.sampling.permutation import Permutation, derive_key
from megatron_cpt.sampling.spans import SpanGrid


class SampleLocation(NamedTuple):
    """Where a sample lies.

    Attributes:
        source: name of the source.
        k: number of the sample in the source, from 0, counted over all epochs in samples of its length.
        epoch: how often every span had been read before this epoch, from 0.
        span: number of the span in the epoch's grid over all files.
        file: number of the file in the source.
        prefix: path of the file without `.bin`.
        token_offset: the sample's first token in the `.bin`, in tokens.
        seq_length: tokens it is trained on.
    """

    source: str
    k: int
    epoch: int
    span: int
    file: int
    prefix: str
    token_offset: int
    seq_length: int


@dataclass(frozen=True)
class _Epoch:
    """One pass over a source: the order of its spans, and how far the grid of each file looked at is shifted."""

    number: int
    order: Permutation
    shifts: dict[int, int] = field(default_factory=dict)


class TokenStream:
    """One source: the spans of its files in a keyed order, epoch after epoch.

    A file of T tokens has n = (T - 1) // seq_length spans. What is left over (T - 1 - n * seq_length tokens) is
    the room in which the file's grid is shifted by a keyed offset each epoch, so that it is not the same tokens
    that are never seen, nor the same places where samples begin.

    Args:
        name: the source's name; part of the key, so that two sources over the same files differ.
        datasets: its files, in a fixed order.
        seq_length: tokens a sample is trained on (of several lengths the longest; the others divide it); one more is
            read, as the last label.
        seed: the run's seed.
        fim: how samples are rearranged after they were read; None: not at all.

    Attributes:
        dtype: holds every token of it.

    Raises:
        UserError: no file has seq_length + 1 tokens.
        RefusedError: a file's token type is not an integer.
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
                    f"{dataset.prefix}.idx: source {name}: the token type is {dataset.dtype.name}, and ids of a "
                    "vocabulary are integers; is this a token file? Build it with `megatron-cpt preprocess`"
                )
        spans = [max(0, dataset.num_tokens - 1) // seq_length for dataset in self.datasets]
        self._last_spans = list(accumulate(spans))  # of each file: spans up to and with it
        self.num_tokens = sum(dataset.num_tokens for dataset in self.datasets)
        self.samples_per_epoch = sum(spans)
        self.grid = SpanGrid(seq_length, self.samples_per_epoch)
        if self.samples_per_epoch == 0:
            raise UserError(
                f"source {name}: {self.num_tokens} tokens in {len(self.datasets)} file(s) are too few for one sample "
                f"of seq_length + 1 = {seq_length + 1} tokens in one file; give it more data or leave it out"
            )
        added = [] if fim is None else [fim.dtype]
        self.dtype = np.result_type(*(dataset.dtype for dataset in self.datasets), *added)
        self._epoch: _Epoch | None = None  # the one read last
        self._window: tuple[tuple[int, int, int], Permutation] | None = None  # the one read last, and its order

    @classmethod
    def open(
        cls, name: str, prefixes: str | list[str], *, seq_length: int, seed: int, fim: FillInMiddle | None = None
    ) -> TokenStream:
        """Open the files of a source."""
        datasets = [IndexedDataset(prefix) for prefix in expand_prefixes(prefixes)]
        return cls(name, datasets, seq_length=seq_length, seed=seed, fim=fim)

    def __getitem__(self, sample_index: int) -> npt.NDArray[Any]:
        """Return the seq_length + 1 token ids of a sample; see `read`."""
        return self.read(sample_index)

    def __repr__(self) -> str:
        return f"TokenStream({self.name!r}: {self.samples_per_epoch} samples of {self.seq_length} tokens an epoch)"

    def locate(self, k: int, seq_length: int | None = None) -> SampleLocation:
        """Where sample k lies. Touches no file.

        Args:
            k: the sample, counted from 0 over all epochs in samples of this length.
            seq_length: tokens in it, a divisor of the stream's own; left out: the stream's own.

        Raises:
            IndexError: k is negative.
        """
        if k < 0:
            raise IndexError(f"source {self.name}: sample {k}; the first is 0")
        length = seq_length or self.seq_length
        assert self.seq_length % length == 0, f"samples of {length} tokens do not fill spans of {self.seq_length}"
        if length == self.seq_length:
            epoch, place = divmod(int(k), self.samples_per_epoch)
            part = 0
        else:
            epoch, place, part = self._find_part(int(k), length)
        current = self._enter(epoch)
        span = current.order(place)
        file = bisect_right(self._last_spans, span)
        first_span = self._last_spans[file - 1] if file else 0
        token_offset = self._shift(file, current) + self.seq_length * (span - first_span) + length * part
        return SampleLocation(self.name, int(k), epoch, span, file, self.datasets[file].prefix, token_offset, length)

    def read(self, k: int, seq_length: int | None = None) -> npt.NDArray[Any]:
        """The seq_length + 1 tokens of sample k that are trained on, in the file's type; arguments as of `locate`.

        Raises:
            IndexError: k is negative.
            RefusedError: the file became shorter since it was opened.
        """
        return self.rearrange(self.read_plain(k, seq_length), k, seq_length)

    def rearrange(self, tokens: npt.NDArray[Any], k: int, seq_length: int | None = None) -> npt.NDArray[Any]:
        """Sample k as it is trained on, from its tokens as they lie in the file; arguments as of `locate`."""
        if self.fim is None:
            return tokens
        shorter = [] if seq_length is None or seq_length == self.seq_length else [seq_length]
        return self.fim.apply(tokens, derive_key(self.seed, self.name, "fim", int(k), *shorter))

    def read_plain(self, k: int, seq_length: int | None = None) -> npt.NDArray[Any]:
        """Sample k as it lies in its file: one contiguous read; arguments as of `locate`.

        Raises:
            IndexError: k is negative.
            RefusedError: the file became shorter since it was opened.
        """
        location = self.locate(k, seq_length)
        return self.datasets[location.file].read(location.token_offset, location.seq_length + 1)

    def _find_part(self, k: int, length: int) -> tuple[int, int, int]:
        """The epoch of a shorter sample, the place of its span in the epoch's order, and its part of the span."""
        parts, window = self.grid.parts(length), self.grid.window
        epoch, within = divmod(k, self.samples_per_epoch * parts)
        number, place = divmod(within, window * parts)
        if self._window is None or self._window[0] != (epoch, number, length):
            spans = min(window, self.samples_per_epoch - number * window)
            key = derive_key(self.seed, self.name, epoch, "window", number, length)
            self._window = (epoch, number, length), Permutation(spans * parts, key)
        span, part = divmod(self._window[1](place), parts)
        return epoch, number * window + span, part

    def _enter(self, epoch: int) -> _Epoch:
        current = self._epoch
        if current is None or current.number != epoch:
            order = Permutation(self.samples_per_epoch, derive_key(self.seed, self.name, epoch))
            self._epoch = current = _Epoch(epoch, order)
        return current

    def _shift(self, file: int, epoch: _Epoch) -> int:
        """Where the file's grid begins in this epoch, uniform in [0, slack]."""
        shift = epoch.shifts.get(file)
        if shift is None:
            slack = (self.datasets[file].num_tokens - 1) % self.seq_length
            shift = derive_key(self.seed, self.name, epoch.number, "shift", file) % (slack + 1)
            epoch.shifts[file] = shift
        return shift
