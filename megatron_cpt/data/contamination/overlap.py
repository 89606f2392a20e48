"""Contamination: which held-out documents a training set contains, in whole or in part.

Two documents share an n-gram where n ids in a row are the same (13 by custom: Brown et al. 2020, arXiv 2005.14165,
appendix C, there of words). Both sides must be encoded by the same tokenizer. The held-out side is kept in memory
(about 60 bytes a token); the training side streams by, however large it is.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.contamination.ngrams import HashSet, ngram_hashes, windows_inside
from megatron_cpt.data.tokenfile.documents import DocumentBlock, document_blocks
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import UserError

NGRAM = 13
NEAR = 0.8
_MOST_TRAINING = 20  # training documents that are named
_Verdict = Literal["exact", "near", "partial", "clean", "short"]


@dataclass(frozen=True)
class TrainingHit:
    """A training document that shares n-grams with held-out ones.

    Attributes:
        prefix: its data set.
        document: its number there.
        shared: how many of its n-grams are held out.
        ngrams: how many it has.
    """

    prefix: str
    document: int
    shared: int
    ngrams: int


@dataclass
class HeldOutDocument:
    """What was found of one held-out document.

    Attributes:
        name: what to call it.
        ngrams: its distinct n-grams; 0: it is too short to have one, and only a copy of the whole can be found.
        found: how many of them stand anywhere in the training set.
        copies: training documents that are the same.
        best_shared: most of its n-grams that one training document has.
        best_prefix: the data set of that document, or of the first copy.
        best_document: its number there.
    """

    name: str
    ngrams: int
    found: int = 0
    copies: int = 0
    best_shared: int = 0
    best_prefix: str | None = None
    best_document: int | None = None

    def verdict(self, near: float) -> _Verdict:
        """How contaminated it is.

        Args:
            near: share of its n-grams in one training document from which it counts as a near copy.
        """
        if self.copies:
            return "exact"
        if not self.ngrams:
            return "short"
        if self.best_shared >= near * self.ngrams:
            return "near"
        return "partial" if self.found else "clean"


@dataclass
class OverlapReport:
    """What a training set and a held-out set have in common.

    Attributes:
        ngram: ids a run.
        near: see `HeldOutDocument.verdict`.
        held_out: the held-out documents in order.
        training_documents: training documents looked at.
        training_tokens: their tokens.
        training_hits: how many of them share an n-gram with a held-out one, or are a copy of one.
        worst: the training documents that share most, most first.
    """

    ngram: int
    near: float
    held_out: list[HeldOutDocument]
    training_documents: int = 0
    training_tokens: int = 0
    training_hits: int = 0
    worst: list[TrainingHit] = field(default_factory=list)

    def counts(self) -> dict[_Verdict, int]:
        """Held-out documents by verdict."""
        verdicts = [document.verdict(self.near) for document in self.held_out]
        every: tuple[_Verdict, ...] = ("exact", "near", "partial", "clean", "short")
        return {verdict: verdicts.count(verdict) for verdict in every}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        documents = [asdict(document) | {"verdict": document.verdict(self.near)} for document in self.held_out]
        return asdict(self) | {"counts": self.counts(), "held_out": documents}


class HeldOutSet:
    """The documents that training must not have seen, ready to be looked for.

    Args:
        documents: name and ids of each. An end-of-document id at the end should be gone on both sides or on none.
        ngram: ids a run.
        eod_id: dropped from the end of documents, here and in training.

    Raises:
        UserError: there is none, or n is not positive.
    """

    def __init__(
        self, documents: Iterable[tuple[str, npt.NDArray[Any]]], *, ngram: int = NGRAM, eod_id: int | None = None
    ) -> None:
        if ngram < 1:
            raise UserError(f"ngram: {ngram}: give the number of ids in a row that counts, such as {NGRAM}")
        self.ngram, self.eod_id = ngram, eod_id
        self.documents: list[HeldOutDocument] = []
        self._whole: dict[bytes, list[int]] = {}
        lengths: set[int] = set()
        grams: list[npt.NDArray[np.uint64]] = []
        for number, (name, ids) in enumerate(documents):
            ids = _without_eod(ids, eod_id)
            grams.append(np.unique(ngram_hashes(ids, ngram)))
            self.documents.append(HeldOutDocument(name, len(grams[-1])))
            if len(ids):
                self._whole.setdefault(_digest(ids), []).append(number)
                lengths.update((len(ids), len(ids) + (eod_id is not None)))
        if not self.documents:
            raise UserError("the held-out set has no documents: there is nothing to compare with")
        flat = np.concatenate(grams)
        self.grams = HashSet(flat)
        self._found = np.zeros(len(self.grams), np.bool_)
        self._lengths = np.array(sorted(lengths), np.int64)  # of a copy, with and without its end
        self._index_owners(flat, grams)

    def _index_owners(self, flat: npt.NDArray[np.uint64], grams: Sequence[npt.NDArray[np.uint64]]) -> None:
        """For each n-gram the held-out documents that have it: owners[owner_starts[i] : owner_starts[i + 1]]."""
        members = np.searchsorted(self.grams.values, flat)
        owners = np.repeat(np.arange(len(grams)), [len(gram) for gram in grams])
        self._owners = owners[np.argsort(members, kind="stable")]
        self._owner_starts = np.concatenate([[0], np.cumsum(np.bincount(members, minlength=len(self.grams)))])

    def look_through(self, prefix: str, block: DocumentBlock) -> tuple[npt.NDArray[np.bool_], list[TrainingHit]]:
        """Compare a block of training documents, and remember what was found of the held-out ones.

        Returns:
            bool (num_documents,): which of them share something; and the same as hits.
        """
        places, members = self.grams.find(ngram_hashes(block.tokens, self.ngram))
        inside = windows_inside(block.bounds, self.ngram)[places]
        places, members = places[inside], members[inside]
        self._found[members] = True
        documents = np.searchsorted(block.bounds, places, side="right") - 1
        is_hit = np.zeros(block.num_documents, np.bool_)
        hits = []
        numbers, starts = np.unique(documents, return_index=True)
        for number, start, end in zip(numbers.tolist(), starts, np.append(starts, len(documents))[1:], strict=True):
            self._compare(prefix, block.first + number, np.unique(members[start:end]))
            ngrams = max(0, int(block.lengths[number]) - self.ngram + 1)
            hits.append(TrainingHit(prefix, block.first + number, int(end - start), ngrams))
            is_hit[number] = True
        for number in self._copies(prefix, block):
            if not is_hit[number]:  # too short to have an n-gram
                hits.append(TrainingHit(prefix, block.first + number, 0, 0))
            is_hit[number] = True
        return is_hit, hits

    def results(self) -> list[HeldOutDocument]:
        """The held-out documents with all that was found so far."""
        found = np.bincount(
            self._owners[np.repeat(self._found, np.diff(self._owner_starts))], minlength=len(self.documents)
        )
        for document, number in zip(self.documents, found.tolist(), strict=True):
            document.found = number
        return self.documents

    def _compare(self, prefix: str, number: int, members: npt.NDArray[np.int64]) -> None:
        """One training document's distinct held-out n-grams: whose are they, and is it the nearest so far?"""
        spans = [self._owners[self._owner_starts[m] : self._owner_starts[m + 1]] for m in members.tolist()]
        owners, shared = np.unique(np.concatenate(spans), return_counts=True)
        for owner, count in zip(owners.tolist(), shared.tolist(), strict=True):
            document = self.documents[owner]
            if count > document.best_shared and not document.copies:
                document.best_shared, document.best_prefix, document.best_document = count, prefix, number

    def _copies(self, prefix: str, block: DocumentBlock) -> Iterator[int]:
        """Training documents of the block that are the same as a held-out one."""
        for place in np.flatnonzero(np.isin(block.lengths, self._lengths)).tolist():
            owners = self._whole.get(_digest(_without_eod(block.document(place), self.eod_id)), ())
            for owner in owners:
                document = self.documents[owner]
                if not document.copies:
                    document.best_shared = document.ngrams
                    document.best_prefix, document.best_document = prefix, block.first + place
                document.copies += 1
            if owners:
                yield place


def find_overlap(
    training: Sequence[IndexedDataset],
    held_out: HeldOutSet,
    *,
    near: float = NEAR,
    on_block: Callable[[IndexedDataset, DocumentBlock, npt.NDArray[np.bool_]], None] | None = None,
) -> OverlapReport:
    """Look for held-out documents in training data.

    Args:
        training: the data sets to look through.
        held_out: what to look for.
        near: see `HeldOutDocument.verdict`.
        on_block: called with each block of training documents that is done and which of them share something, for
            progress, or to write the clean ones elsewhere.

    Raises:
        RefusedError: a data set is damaged.
    """
    report = OverlapReport(held_out.ngram, near, held_out.documents)
    worst: list[tuple[int, int, TrainingHit]] = []
    for dataset in training:
        for block in document_blocks(dataset):
            is_hit, hits = held_out.look_through(dataset.prefix, block)
            for hit in hits:
                report.training_hits += 1
                # the earlier of two that share as much stays in front
                entry = (hit.shared, -report.training_hits, hit)
                heapq.heappush(worst, entry) if len(worst) < _MOST_TRAINING else heapq.heappushpop(worst, entry)
            report.training_documents += block.num_documents
            report.training_tokens += block.tokens.size
            if on_block is not None:
                on_block(dataset, block, is_hit)
    report.held_out = held_out.results()
    report.worst = [hit for _, _, hit in sorted(worst, reverse=True, key=lambda entry: entry[:2])]
    return report


def _without_eod(ids: npt.NDArray[Any], eod_id: int | None) -> npt.NDArray[Any]:
    return ids[:-1] if len(ids) and eod_id is not None and int(ids[-1]) == eod_id else ids


def _digest(ids: npt.NDArray[Any]) -> bytes:
    """128 bits of the ids in one type, so that a uint16 and an int32 document compare."""
    return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=16).digest()
