"""Summary of a dataset: counts, lengths of documents, and single documents."""

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
    """Bin of a histogram of document lengths: documents of `low` to `high` tokens, and all their tokens."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Summary:
    """Statistics of a dataset.

    Attributes:
        sequences: number of sequences; a document has one or more.
        bytes: size of the `.bin`.
        mean: mean tokens per document; None without documents, like `shortest` and `longest` (also in tokens).
        percentiles: tokens per document by percentile; each value is the length of an existing document.
        histogram: bins that double in length, including empty bins between the first and the last.
        fingerprint: fingerprint of the dataset, as checkpoints record it.
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
        """Return plain JSON values."""
        return asdict(self) | {"percentiles": {f"p{key}": value for key, value in self.percentiles.items()}}


@dataclass(frozen=True)
class Document:
    """Document of a dataset.

    Attributes:
        first_token: offset of the document's first token in the `.bin`, in tokens.
    """

    number: int
    first_token: int
    ids: npt.NDArray[Any]


def summarize(dataset: IndexedDataset) -> Summary:
    """Compute the statistics of a dataset. Reads only the `.idx`; takes 4 bytes of memory per document.

    Raises:
        RefusedError: the index is damaged.
    """
    most = np.iinfo(np.uint32).max  # in theory, a document of several sequences may exceed 32 bits
    parts = [np.diff(bounds).clip(max=most).astype(np.uint32) for _, bounds in bounds_in_blocks(dataset)]
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
    """Return the bins 0, 1, 2 to 3, 4 to 7, ... of sorted lengths."""
    if not len(lengths):
        return ()
    lows = [0, *(1 << power for power in range(33))]
    highs = [0, *((1 << power + 1) - 1 for power in range(33))]
    edges = np.searchsorted(lengths, np.array([*lows, 1 << 33], np.int64)).tolist()
    bins = [
        LengthBin(low, high, stop - start, int(lengths[start:stop].sum(dtype=np.int64)))
        for low, high, start, stop in zip(lows, highs, edges[:-1], edges[1:], strict=True)
    ]
    filled = [i for i, entry in enumerate(bins) if entry.documents]
    return tuple(bins[filled[0] : filled[-1] + 1])


def get_document(dataset: IndexedDataset, number: int) -> Document:
    """Read a document.

    Raises:
        UserError: the document does not exist.
        RefusedError: the index is damaged.
    """
    if not 0 <= number < dataset.num_documents:
        known = f"they are 0 to {dataset.num_documents - 1}" if dataset.num_documents else "the dataset is empty"
        raise UserError(f"{dataset.prefix}: no document {number}; {known}")
    start, end = document_bounds(dataset, number, number + 1).tolist()
    return Document(number, start, dataset.read(start, end - start))


def draw_histogram(histogram: Sequence[LengthBin], width: int = 50) -> list[str]:
    """Return the histogram as lines of text: per bin its documents, its share of the tokens, and a bar.

    The longest bar has `width` characters.
    """
    if not histogram:
        return []
    most = max(entry.documents for entry in histogram)
    tokens = sum(entry.tokens for entry in histogram)
    ranges = [_range(entry) for entry in histogram]
    label_width = max(map(len, [*ranges, "tokens"]))
    lines = [f"{'tokens':>{label_width}} {'documents':>12} {'of tokens':>9}"]
    for name, entry in zip(ranges, histogram, strict=True):
        share = entry.tokens / tokens if tokens else 0.0
        label = f"{name:>{label_width}} {entry.documents:>12,} {share:>9.1%} "
        lines.append((label + _bar(entry.documents / most, width)).rstrip())
    return lines


def _range(entry: LengthBin) -> str:
    return f"{entry.low:,}" if entry.low == entry.high else f"{entry.low:,} to {entry.high:,}"


def _bar(share: float, width: int) -> str:
    """Return a bar in steps of 1/8 character; a share above 0 is always visible."""
    blocks, remainder = divmod(max(round(share * width * 8), int(share > 0)), 8)
    return "█" * blocks + (" ▏▎▍▌▋▊▉"[remainder] if remainder else "")
