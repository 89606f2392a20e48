"""Contamination: held-out documents that training data contains, completely or in part.

Two documents overlap if they share an n-gram, that is n equal consecutive ids (13 words in Brown et al. 2020, arXiv
2005.14165, appendix C; here 13 ids). Both sides must be encoded by the same tokenizer. The held-out side is in memory,
about 60 bytes per token; the training side is read in blocks, regardless of its size.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.contamination.ngrams import HashSet, ngram_hashes, ngrams_inside
from megatron_cpt.data.tokenfile.documents import DocumentBlock, document_blocks
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import UserError

NGRAM = 13
NEAR = 0.8
_MOST_TRAINING = 20  # training documents that are listed
_Verdict = Literal["exact", "near", "partial", "clean", "short"]


@dataclass(frozen=True)
class TrainingHit:
    """Training document that shares n-grams with held-out documents.

    Attributes:
        document: index of the document in its dataset.
        shared: number of its n-grams that are in held-out documents.
        ngrams: number of its n-grams.
    """

    prefix: str
    document: int
    shared: int
    ngrams: int


@dataclass
class HeldOutDocument:
    """Result of the search for one held-out document.

    Attributes:
        ngrams: number of its distinct n-grams; 0: it is shorter than an n-gram, so only exact copies are found.
        found: number of its n-grams that are anywhere in the training data.
        copies: number of training documents with the same ids.
        best_shared: largest number of its n-grams in a single training document.
        best_prefix: dataset of that training document, or of the first copy.
        best_document: index of that training document in its dataset.
    """

    name: str
    ngrams: int
    found: int = 0
    copies: int = 0
    best_shared: int = 0
    best_prefix: str | None = None
    best_document: int | None = None

    def verdict(self, near: float) -> _Verdict:
        """Classify the document; a near copy shares at least `near` of its n-grams with one training document."""
        if self.copies:
            return "exact"
        if not self.ngrams:
            return "short"
        if self.best_shared >= near * self.ngrams:
            return "near"
        return "partial" if self.found else "clean"


@dataclass
class OverlapReport:
    """Overlap between training data and a held-out set.

    Attributes:
        ngram: ids per n-gram.
        near: see `HeldOutDocument.verdict`.
        training_documents: number of training documents searched.
        training_hits: number of training documents that share an n-gram with a held-out document or are a copy of it.
        worst: training documents that share the most n-grams, in descending order.
    """

    ngram: int
    near: float
    held_out: list[HeldOutDocument]
    training_documents: int = 0
    training_tokens: int = 0
    training_hits: int = 0
    worst: list[TrainingHit] = field(default_factory=list)

    def counts(self) -> dict[_Verdict, int]:
        """Return the number of held-out documents per verdict."""
        verdicts = [document.verdict(self.near) for document in self.held_out]
        return {verdict: verdicts.count(verdict) for verdict in get_args(_Verdict)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        documents = [asdict(document) | {"verdict": document.verdict(self.near)} for document in self.held_out]
        return asdict(self) | {"counts": self.counts(), "held_out": documents}


class HeldOutSet:
    """Held-out documents, indexed for the search in training data.

    Args:
        documents: name and ids of each document.
        ngram: ids per n-gram.
        eod_id: end-of-document id, which is removed from the end of held-out and training documents.

    Raises:
        UserError: there are no documents, or `ngram` is not positive.
    """

    def __init__(
        self, documents: Iterable[tuple[str, npt.NDArray[Any]]], *, ngram: int = NGRAM, eod_id: int | None = None
    ) -> None:
        if ngram < 1:
            raise UserError(f"ngram: {ngram}: give a positive number of consecutive ids, such as {NGRAM}")
        self.ngram, self.eod_id = ngram, eod_id
        self.documents: list[HeldOutDocument] = []
        self._numbers_by_digest: dict[bytes, list[int]] = {}
        lengths: set[int] = set()
        grams: list[npt.NDArray[np.uint64]] = []
        for number, (name, ids) in enumerate(documents):
            ids = _without_eod(ids, eod_id)
            grams.append(np.unique(ngram_hashes(ids, ngram)))
            self.documents.append(HeldOutDocument(name, len(grams[-1])))
            if len(ids):
                self._numbers_by_digest.setdefault(_digest(ids), []).append(number)
                lengths.update((len(ids), len(ids) + (eod_id is not None)))
        if not self.documents:
            raise UserError("the held-out set has no documents: there is nothing to search for; check --held-out")
        flat = np.concatenate(grams)
        self.grams = HashSet(flat)
        self._found = np.zeros(len(self.grams), np.bool_)
        self._lengths = np.array(sorted(lengths), np.int64)  # of a copy, with and without the end-of-document id
        # The held-out documents of n-gram i are owners[owner_starts[i] : owner_starts[i + 1]].
        members = np.searchsorted(self.grams.values, flat)
        owners = np.repeat(np.arange(len(grams)), [len(gram) for gram in grams])
        self._owners = owners[np.argsort(members, kind="stable")]
        self._owner_starts = np.concatenate([[0], np.cumsum(np.bincount(members, minlength=len(self.grams)))])

    def search(self, prefix: str, block: DocumentBlock) -> tuple[npt.NDArray[np.bool_], list[TrainingHit]]:
        """Search a block of training documents, and add the matches to the results.

        Returns:
            bool (num_documents,), True for documents that overlap with the held-out set; and these documents as hits.
        """
        offsets, members = self.grams.find(ngram_hashes(block.tokens, self.ngram))
        is_inside = ngrams_inside(block.bounds, self.ngram)[offsets]
        offsets, members = offsets[is_inside], members[is_inside]
        self._found[members] = True
        documents = np.searchsorted(block.bounds, offsets, side="right") - 1
        is_hit = np.zeros(block.num_documents, np.bool_)
        hits = []
        numbers, starts = np.unique(documents, return_index=True)
        for number, start, end in zip(numbers.tolist(), starts, np.append(starts, len(documents))[1:], strict=True):
            self._update_best(prefix, block.first + number, np.unique(members[start:end]))
            ngrams = max(0, int(block.lengths[number]) - self.ngram + 1)
            hits.append(TrainingHit(prefix, block.first + number, int(end - start), ngrams))
            is_hit[number] = True
        for number in self._copies(prefix, block):
            if not is_hit[number]:  # too short to have an n-gram
                hits.append(TrainingHit(prefix, block.first + number, 0, 0))
            is_hit[number] = True
        return is_hit, hits

    def results(self) -> list[HeldOutDocument]:
        """Return the results of the search so far."""
        found = np.bincount(
            self._owners[np.repeat(self._found, np.diff(self._owner_starts))], minlength=len(self.documents)
        )
        for document, number in zip(self.documents, found.tolist(), strict=True):
            document.found = number
        return self.documents

    def _update_best(self, prefix: str, number: int, members: npt.NDArray[np.int64]) -> None:
        """Update the best match of the held-out documents that share these n-grams with a training document."""
        owner_lists = [self._owners[self._owner_starts[m] : self._owner_starts[m + 1]] for m in members.tolist()]
        owners, shared = np.unique(np.concatenate(owner_lists), return_counts=True)
        for owner, count in zip(owners.tolist(), shared.tolist(), strict=True):
            document = self.documents[owner]
            if count > document.best_shared and not document.copies:
                document.best_shared, document.best_prefix, document.best_document = count, prefix, number

    def _copies(self, prefix: str, block: DocumentBlock) -> Iterator[int]:
        """Yield the documents of the block that are exact copies of a held-out document, and count them."""
        for index in np.flatnonzero(np.isin(block.lengths, self._lengths)).tolist():
            owners = self._numbers_by_digest.get(_digest(_without_eod(block.document(index), self.eod_id)), ())
            for owner in owners:
                document = self.documents[owner]
                if not document.copies:
                    document.best_shared = document.ngrams
                    document.best_prefix, document.best_document = prefix, block.first + index
                document.copies += 1
            if owners:
                yield index


def find_overlap(
    training: Sequence[IndexedDataset],
    held_out: HeldOutSet,
    *,
    near: float = NEAR,
    on_block: Callable[[IndexedDataset, DocumentBlock, npt.NDArray[np.bool_]], None] | None = None,
) -> OverlapReport:
    """Search training data for held-out documents.

    Args:
        near: see `HeldOutDocument.verdict`.
        on_block: called after each block of training documents, with a mask of the documents that overlap: to show
            progress, or to write the clean documents.

    Raises:
        RefusedError: a dataset is damaged.
        ChangedFileError: a dataset changed while it was read.
    """
    report = OverlapReport(held_out.ngram, near, held_out.documents)
    worst: list[tuple[int, int, TrainingHit]] = []
    for dataset in training:
        for block in document_blocks(dataset):
            is_hit, hits = held_out.search(dataset.prefix, block)
            for hit in hits:
                report.training_hits += 1
                # of two hits with equal n-grams, the earlier one ranks first
                entry = (hit.shared, -report.training_hits, hit)
                heapq.heappush(worst, entry) if len(worst) < _MOST_TRAINING else heapq.heappushpop(worst, entry)
            report.training_documents += block.num_documents
            report.training_tokens += block.tokens.size
            if on_block is not None:
                on_block(dataset, block, is_hit)
    for dataset in training:
        dataset.check_unchanged()
    report.held_out = held_out.results()
    report.worst = [hit for _, _, hit in sorted(worst, reverse=True, key=lambda entry: entry[:2])]
    return report


def _without_eod(ids: npt.NDArray[Any], eod_id: int | None) -> npt.NDArray[Any]:
    return ids[:-1] if len(ids) and eod_id is not None and int(ids[-1]) == eod_id else ids


def _digest(ids: npt.NDArray[Any]) -> bytes:
    """Hash ids to 128 bits; equal for uint16 and int32 documents with the same ids."""
    return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=16).digest()
