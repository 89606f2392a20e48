"""Check of the documents of a valid index: empty documents, duplicates, and missing end-of-document ids."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.inspect.findings import MOST_NAMED, Finding, listed
from megatron_cpt.data.tokenfile.documents import bounds_in_blocks, document_bounds
from megatron_cpt.data.tokenfile.reader import IndexedDataset

_LEAST_EOD_SHARE = 0.5  # share of documents that must end with an id to take it for the end-of-document id
_PROBE_TOKENS = 8  # tokens read at the start, middle and end of a document; enough to tell most documents apart
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class DocumentReport:
    """Statistics of all documents.

    Attributes:
        num_empty: documents without tokens.
        num_duplicates: documents with the same tokens as an earlier document; None: not searched.
        eod_id: end-of-document id, as given; None: it is unknown.
        likely_eod_id: without `eod_id`, the id that most documents end with, such as the end of a sentence.
        likely_share: share of the nonempty documents that end with `likely_eod_id`.
        num_without_eod: nonempty documents that do not end with `eod_id`; None without an `eod_id`.
    """

    num_empty: int
    num_duplicates: int | None
    eod_id: int | None
    likely_eod_id: int | None
    likely_share: float
    num_without_eod: int | None
    findings: list[Finding]


def check_documents(dataset: IndexedDataset, *, eod_id: int | None = None, duplicates: bool = True) -> DocumentReport:
    """Check the documents of a dataset whose index is valid.

    The search for duplicates takes 16 bytes of memory per document; without it, memory is constant.

    Args:
        eod_id: id that each document must end with; None: unknown.
    """
    tokens = _tokens(dataset)
    last_ids, num_empty, first_empty = Counter[int](), 0, list[int]()
    for first, bounds in bounds_in_blocks(dataset):
        lengths = np.diff(bounds)
        num_empty += int((lengths == 0).sum())
        first_empty += (first + np.flatnonzero(lengths == 0)[: MOST_NAMED - len(first_empty)]).tolist()
        ids, counts = np.unique(tokens[bounds[1:][lengths > 0] - 1], return_counts=True)
        last_ids.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
    named = [(f"document {number}", 0, "is empty") for number in first_empty]
    findings = list(listed("warning", "empty_document", f"{dataset.prefix}.idx", num_empty, named))
    num_without = None if eod_id is None else last_ids.total() - last_ids[eod_id]
    if eod_id is not None and num_without:
        findings += _without_eod(dataset, tokens, eod_id, num_without)
    likely, share = (None, 0.0) if eod_id is not None else _most_frequent_end(last_ids)
    if eod_id is None and last_ids and share < 1:
        findings.append(_uncertain_end(dataset, likely, share))
    num_duplicates = None
    if duplicates:
        copies = find_duplicates(dataset)
        num_duplicates = len(copies)
        named = [
            (f"document {copy}", first, f"is a duplicate of document {first}") for copy, first in copies[:MOST_NAMED]
        ]
        findings += listed("warning", "duplicate_document", f"{dataset.prefix}.bin", num_duplicates, named)
    return DocumentReport(num_empty, num_duplicates, eod_id, likely, share, num_without, findings)


def _tokens(dataset: IndexedDataset) -> npt.NDArray[Any]:
    """Map the `.bin` into memory, because single tokens all over the file are needed."""
    if dataset.num_tokens == 0:
        return np.empty(0, dataset.dtype)
    return np.memmap(f"{dataset.prefix}.bin", dataset.dtype, mode="r", shape=(dataset.num_tokens,))


def _most_frequent_end(last_ids: Counter[int]) -> tuple[int | None, float]:
    """Return the id that most documents end with, and their share; None if no id is that frequent."""
    if last_ids.total() < 2:  # the last id of a single document proves nothing
        return None, 0.0
    token, count = last_ids.most_common(1)[0]
    share = count / last_ids.total()
    return (token, share) if share >= _LEAST_EOD_SHARE else (None, 0.0)


def _uncertain_end(dataset: IndexedDataset, likely: int | None, share: float) -> Finding:
    found = "documents have no common last id"
    if likely is not None:
        found = f"{share:.1%} of the documents end with id {likely}, which may only end a sentence"
    problem = (
        f"{found}: the model does not learn where a document ends; use preprocess --append-eod, or name the id that "
        "must end each document: --eod-id"
    )
    return Finding("warning", "no_eod", f"{dataset.prefix}.bin", "", likely, problem)


def _without_eod(dataset: IndexedDataset, tokens: npt.NDArray[Any], eod_id: int, total: int) -> Iterator[Finding]:
    named: list[tuple[str, int, str]] = []
    for first, bounds in bounds_in_blocks(dataset):
        nonempty = np.flatnonzero(np.diff(bounds) > 0)
        ends = tokens[bounds[nonempty + 1] - 1]
        for i in np.flatnonzero(ends != eod_id)[: MOST_NAMED - len(named)].tolist():
            problem = f"ends with id {ends[i]}, not with the end-of-document id {eod_id}"
            named.append((f"document {first + nonempty[i]}", int(ends[i]), problem))
        if len(named) >= min(MOST_NAMED, total):
            break
    yield from listed("fault", "missing_eod", f"{dataset.prefix}.bin", total, named)


def find_duplicates(dataset: IndexedDataset) -> list[tuple[int, int]]:
    """Find duplicate documents: pairs (document, first document with the same tokens), in order.

    A 64-bit key from the length and 24 tokens tells most documents apart. Only documents with equal keys are read
    completely and compared by a 128-bit hash. Empty documents do not count.
    """
    if dataset.num_documents < 2:
        return []
    keys = np.concatenate([_probe_keys(dataset, bounds) for _, bounds in bounds_in_blocks(dataset)])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    equal = np.flatnonzero((keys[1:] == keys[:-1]) & (keys[1:] != 0))  # key 0: an empty document
    copies: list[tuple[int, int]] = []
    for run in np.split(equal, np.flatnonzero(np.diff(equal) > 1) + 1) if equal.size else []:
        firsts: dict[bytes, int] = {}
        for number in order[run[0] : run[-1] + 2].tolist():  # ascending, because the sort is stable
            start, end = document_bounds(dataset, number, number + 1).tolist()
            digest = hashlib.blake2b(dataset.read(start, end - start).data, digest_size=16).digest()
            first = firsts.setdefault(digest, number)
            if first != number:
                copies.append((number, first))
    return sorted(copies)


def _probe_keys(dataset: IndexedDataset, bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return a key per document from its length and 3 x 8 of its tokens; 0 exactly for empty documents."""
    tokens, lengths = _tokens(dataset), np.diff(bounds)
    keys = np.zeros(len(lengths), np.uint64)
    filled = np.flatnonzero(lengths)
    starts, sizes = bounds[filled], lengths[filled]
    hashed = sizes.astype(np.uint64)
    for offset in range(_PROBE_TOKENS):
        positions = (np.minimum(offset, sizes - 1), np.minimum(sizes // 2 + offset, sizes - 1), sizes - 1 - offset)
        for position in positions:
            ids = tokens[starts + np.maximum(position, 0)].astype(np.uint64)
            hashed = (hashed ^ (hashed >> np.uint64(29))) * _ODD + ids
    keys[filled] = hashed | np.uint64(1)
    return keys
