"""What is in a data set: counts, how long its documents are, and single documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.tokenfile.documents import bounds_in_blocks, document_bounds
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import UserError

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)


@dataclass(frozen=True)
class LengthBin:
    """Documents of about one length.

    Attributes:
        low: the least tokens of a document in it.
        high: the most.
        documents: how many there are.
        tokens: what they hold together.
    """

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Summary:
    """A data set in numbers.

    Attributes:
        prefix: the path without `.bin` or `.idx`.
        dtype: token type.
        documents: how many there are.
        sequences: megatron's sequences.
        tokens: tokens in the `.bin`.
        bytes: size of the `.bin`.
        mean: mean length of a document in tokens; None without documents, as the next three.
        shortest: least tokens of a document.
        longest: most tokens of a document.
        percentiles: length by percentile of the documents; each is the length of a real document.
        histogram: lengths in powers of two, without gaps between the first and the last.
        fingerprint: what a checkpoint knows it by.
    """

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    bytes: int
    mean: float | None
    shortest: int | None
    longest: int | None
    percentiles: dict[int, int]
    histogram: tuple[LengthBin, ...]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"percentiles": {f"p{key}": value for key, value in self.percentiles.items()}}


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        number: its place in the data set.
        first_token: its first token, counted in the `.bin`.
        ids: its tokens.
    """

    number: int
    first_token: int
    ids: npt.NDArray[Any]


def summarize(dataset: IndexedDataset) -> Summary:
    """Count a data set. Reads its `.idx` only; takes 4 bytes of memory a document.

    Raises:
        RefusedError: the index is damaged.
    """
    # a document of more than one sequence may be longer than an int32, but nobody has one
    parts = [
        np.diff(bounds).clip(max=np.iinfo(np.uint32).max).astype(np.uint32) for _, bounds in bounds_in_blocks(dataset)
    ]
    lengths = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint32)
    count = len(lengths)
    return Summary(
        prefix=dataset.prefix,
        dtype=dataset.dtype.name,
        documents=dataset.num_documents,
        sequences=dataset.num_sequences,
        tokens=dataset.num_tokens,
        bytes=dataset.num_tokens * dataset.dtype.itemsize,
        mean=int(lengths.sum(dtype=np.int64)) / count if count else None,
        shortest=int(lengths[0]) if count else None,
        longest=int(lengths[-1]) if count else None,
        percentiles={p: int(lengths[min(count - 1, count * p // 100)]) for p in PERCENTILES} if count else {},
        histogram=_histogram(lengths),
        fingerprint=fingerprint([dataset]),
    )


def _histogram(lengths: npt.NDArray[np.uint32]) -> tuple[LengthBin, ...]:
    """Bins 0, 1, 2 to 3, 4 to 7, ... of sorted lengths."""
    if not len(lengths):
        return ()
    lows = [0, *(1 << power for power in range(33))]
    highs = [0, *((1 << power + 1) - 1 for power in range(33))]
    edges = np.searchsorted(lengths, np.array([*lows, 1 << 33], np.int64)).tolist()
    bins = [
        LengthBin(low, high, stop - start, int(lengths[start:stop].sum(dtype=np.int64)))
        for low, high, start, stop in zip(lows, highs, edges[:-1], edges[1:], strict=True)
    ]
    filled = [place for place, entry in enumerate(bins) if entry.documents]
    return tuple(bins[filled[0] : filled[-1] + 1])


def get_document(dataset: IndexedDataset, number: int) -> Document:
    """One document with its tokens.

    Raises:
        UserError: there is no such document.
        RefusedError: the index is damaged.
    """
    if not 0 <= number < dataset.num_documents:
        known = f"they are 0 to {dataset.num_documents - 1}" if dataset.num_documents else "it has none"
        raise UserError(f"{dataset.prefix}: no document {number}; {known}")
    start, end = document_bounds(dataset, number, number + 1).tolist()
    return Document(number, start, dataset.read(start, end - start))


def draw_histogram(histogram: Sequence[LengthBin], width: int = 50) -> list[str]:
    """The histogram as lines of text: a bar of documents for each bin, and its share of the tokens.

    Args:
        histogram: the bins.
        width: length of the longest bar in characters.
    """
    most = max((entry.documents for entry in histogram), default=0)
    tokens = sum(entry.tokens for entry in histogram)
    ranges = [_range(entry) for entry in histogram]
    lines = (
        [f"{'tokens':>{max(map(len, [*ranges, 'tokens']))}} {'documents':>12} {'of tokens':>9}"] if histogram else []
    )
    for name, entry in zip(ranges, histogram, strict=True):
        share = entry.tokens / tokens if tokens else 0.0
        label = f"{name:>{max(map(len, [*ranges, 'tokens']))}} {entry.documents:>12,} {share:>9.1%} "
        lines.append((label + _bar(entry.documents / most, width)).rstrip())
    return lines


def _range(entry: LengthBin) -> str:
    return f"{entry.low:,}" if entry.low == entry.high else f"{entry.low:,} to {entry.high:,}"


def _bar(share: float, width: int) -> str:
    """A bar in eighths of a character; what is not nothing shows."""
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
