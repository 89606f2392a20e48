"""What the documents of a sound data set are like: empty ones, copies, and those without an end-of-document id."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.inspect.findings import MOST_NAMED, Finding, listed
from megatron_cpt.data.tokenfile.documents import bounds_in_blocks, document_bounds
from megatron_cpt.data.tokenfile.reader import IndexedDataset

_SHARE_OF_EOD = 0.5  # of the documents must end with one id for it to be taken for the end-of-document id
_PROBE = 8  # tokens at the start, in the middle and at the end of a document that tell most documents apart
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class DocumentReport:
    """Counts over all documents.

    Attributes:
        num_empty: documents without a token.
        num_duplicates: documents that are the same as an earlier one, to the token; None: not looked for.
        eod_id: the id that documents end with: given, or the one that most of them end with; None: there is none.
        num_without_eod: documents that are not empty and do not end with it; None where there is none.
        findings: the same as lines.
    """

    num_empty: int
    num_duplicates: int | None
    eod_id: int | None
    num_without_eod: int | None
    findings: list[Finding]


def check_documents(dataset: IndexedDataset, *, eod_id: int | None = None, duplicates: bool = True) -> DocumentReport:
    """Look at the documents of a data set whose index is sound.

    Takes 16 bytes of memory a document where duplicates are looked for; else it does not depend on their number.

    Args:
        dataset: the data set.
        eod_id: what each document must end with; None: whatever most of them end with.
        duplicates: whether to look for documents that are the same.
    """
    tokens = _tokens(dataset)
    lasts, num_empty, first_empty = Counter[int](), 0, list[int]()
    for first, bounds in bounds_in_blocks(dataset):
        lengths = np.diff(bounds)
        num_empty += int((lengths == 0).sum())
        first_empty += (first + np.flatnonzero(lengths == 0)[: MOST_NAMED - len(first_empty)]).tolist()
        ids, counts = np.unique(tokens[bounds[1:][lengths > 0] - 1], return_counts=True)
        lasts.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    named = [(f"document {number}", 0, "is empty") for number in first_empty]
    findings = list(listed("warning", "empty_document", f"{dataset.prefix}.idx", num_empty, named))
    found_eod = eod_id if eod_id is not None else _usual_end(lasts)
    num_without = None if found_eod is None else lasts.total() - lasts[found_eod]
    if found_eod is not None and num_without:
        findings += _without_eod(dataset, tokens, found_eod, num_without, is_given=eod_id is not None)
    if found_eod is None and lasts:
        problem = "documents end with no common id: nothing in the data tells where one ends and the next begins"
        findings.append(Finding("warning", "no_eod", f"{dataset.prefix}.bin", "", None, problem))
    num_duplicates = None
    if duplicates:
        copies = find_duplicates(dataset)
        num_duplicates = len(copies)
        named = [(f"document {copy}", first, f"is the same as document {first}") for copy, first in copies[:MOST_NAMED]]
        findings += listed("warning", "duplicate_document", f"{dataset.prefix}.bin", num_duplicates, named)
    return DocumentReport(num_empty, num_duplicates, found_eod, num_without, findings)


def _tokens(dataset: IndexedDataset) -> npt.NDArray[Any]:
    """The `.bin` as a memory map: single tokens all over the file are asked for."""
    if dataset.num_tokens == 0:
        return np.empty(0, dataset.dtype)
    return np.memmap(f"{dataset.prefix}.bin", dataset.dtype, mode="r", shape=(dataset.num_tokens,))


def _usual_end(lasts: Counter[int]) -> int | None:
    """The id that documents end with; none where they end with whatever their text ends with."""
    if lasts.total() < 2:  # one document ends with something, which says nothing
        return None
    token, count = lasts.most_common(1)[0]
    return token if count >= _SHARE_OF_EOD * lasts.total() else None


def _without_eod(
    dataset: IndexedDataset, tokens: npt.NDArray[Any], eod_id: int, total: int, *, is_given: bool
) -> Iterator[Finding]:
    named: list[tuple[str, int, str]] = []
    for first, bounds in bounds_in_blocks(dataset):
        places = np.flatnonzero(np.diff(bounds) > 0)
        ends = tokens[bounds[places + 1] - 1]
        for place in np.flatnonzero(ends != eod_id)[: MOST_NAMED - len(named)].tolist():
            problem = f"ends with id {ends[place]}, not with the end-of-document id {eod_id}"
            named.append((f"document {first + places[place]}", int(ends[place]), problem))
        if len(named) >= min(MOST_NAMED, total):
            break
    level: Literal["fault", "warning"] = "fault" if is_given else "warning"
    yield from listed(level, "missing_eod", f"{dataset.prefix}.bin", total, named)


def find_duplicates(dataset: IndexedDataset) -> list[tuple[int, int]]:
    """Documents that are the same as an earlier one: (document, the first that is the same), in order.

    Documents that differ in length or in a few tokens cannot be the same; only the others are read whole and compared
    by a 128-bit hash. Empty documents do not count.
    """
    if dataset.num_documents < 2:
        return []
    keys = np.concatenate([_probe_keys(dataset, bounds) for _, bounds in bounds_in_blocks(dataset)])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    same = np.flatnonzero((keys[1:] == keys[:-1]) & (keys[1:] != 0))  # key 0: an empty document
    copies: list[tuple[int, int]] = []
    for run in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1) if same.size else []:
        firsts: dict[bytes, int] = {}
        for number in order[run[0] : run[-1] + 2].tolist():  # ascending, for the sort is stable
            start, end = document_bounds(dataset, number, number + 1).tolist()
            digest = hashlib.blake2b(dataset.read(start, end - start).data, digest_size=16).digest()
            first = firsts.setdefault(digest, number)
            if first != number:
                copies.append((number, first))
    return sorted(copies)


def _probe_keys(dataset: IndexedDataset, bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A number for each document out of its length and 3 x 8 of its tokens; 0 for an empty one, never for another."""
    tokens, lengths = _tokens(dataset), np.diff(bounds)
    keys = np.zeros(len(lengths), np.uint64)
    filled = np.flatnonzero(lengths)
    starts, sizes = bounds[filled], lengths[filled]
    hashed = sizes.astype(np.uint64)
    for offset in range(_PROBE):
        places = (np.minimum(offset, sizes - 1), np.minimum(sizes // 2 + offset, sizes - 1), sizes - 1 - offset)
        for place in places:
            hashed = (hashed ^ (hashed >> np.uint64(29))) * _ODD + tokens[starts + np.maximum(place, 0)].astype(
                np.uint64
            )
    keys[filled] = hashed | np.uint64(1)
    return keys
