"""Report of `mine`: counts, distances and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_cpt.data.mining.mining_job import MiningJob, Overlap
from megatron_cpt.data.mining.search import Method
from megatron_cpt.data.mining.selection import Mined, locate
from megatron_cpt.data.mining.texts import DocumentTexts
from megatron_cpt.data.tokenfile.reader import IndexedDataset

_EXAMPLES = 20
_EXAMPLE_CHARACTERS = 300
_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class CorpusCount:
    """Documents and tokens of one dataset, all and chosen ones."""

    path: str
    documents: int
    tokens: int
    mined_documents: int
    mined_tokens: int


@dataclass(frozen=True)
class MinedExample:
    """Chosen document beside its nearest query; the texts are cut."""

    distance: float
    query: int
    query_text: str
    path: str
    document: int
    text: str


@dataclass(frozen=True)
class MiningReport:
    """Result of `mine`.

    Attributes:
        output: None for a shard.
        queries: number of queries.
        empty_queries: queries with no word that the embedder knows; nothing is near to them.
        recall: share of the exact neighbors of sampled queries that the search has found.
        near: different documents among the neighbors, before any was dropped.
        distance_quantiles: distance to the nearest query per percentile, of the chosen documents.
        copies_of_queries, copies_of_documents: near-duplicates that were dropped, see `find_copies`.
        overlapping: documents that overlap with held-out ones; None if none were given.
        overlap: what was done with them.
        found_held_out: held-out documents of which 13 ids, or a copy, are in these documents.
        seconds: wall-clock time of this call.
    """

    output: str | None
    embedder: str
    method: Method
    k: int
    queries: int
    empty_queries: int
    seconds: float
    documents: int = 0
    recall: float = 1.0
    near: int = 0
    chosen: int = 0
    copies_of_queries: int = 0
    copies_of_documents: int = 0
    overlapping: int | None = None
    overlap: Overlap = "refuse"
    found_held_out: Sequence[str] = ()
    corpora: Sequence[CorpusCount] = ()
    distance_quantiles: dict[int, float] | None = None
    examples: Sequence[MinedExample] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def begin_report(job: MiningJob, output: str | None) -> MiningReport:
    """Return a report without results."""
    return MiningReport(
        output=output,
        embedder=job.embedder.name,
        method=job.plan.method,
        k=job.plan.k,
        queries=len(job.query_texts),
        empty_queries=len(job.query_texts) - len(job.used),
        overlap=job.options.overlap,
        seconds=0.0,
    )


def describe_mined(job: MiningJob, texts: Sequence[DocumentTexts], chosen: Mined, report: MiningReport) -> MiningReport:
    """Add counts, distances and examples to a report."""
    dataset_of, number_of = locate(chosen.documents, job.starts)
    corpora = []
    for index, dataset in enumerate(job.datasets):
        numbers = number_of[dataset_of == index].tolist()
        tokens = sum(_length(dataset, number) for number in numbers)
        corpora.append(CorpusCount(dataset.prefix, dataset.num_documents, dataset.num_tokens, len(numbers), tokens))
    order = np.lexsort((chosen.documents, chosen.distances))
    picks = order[np.arange(min(_EXAMPLES, len(order))) * len(order) // max(1, min(_EXAMPLES, len(order)))]
    examples = [
        MinedExample(
            distance=float(chosen.distances[pick]),
            query=int(chosen.queries[pick]),
            query_text=job.query_texts[int(chosen.queries[pick])][:_EXAMPLE_CHARACTERS],
            path=job.datasets[dataset_of[pick]].prefix,
            document=int(number_of[pick]),
            text=texts[dataset_of[pick]].start(int(number_of[pick]), _EXAMPLE_CHARACTERS),
        )
        for pick in picks.tolist()
    ]
    distances = np.sort(chosen.distances)
    quantiles = {each: float(distances[(len(distances) - 1) * each // 100]) for each in _QUANTILES if len(distances)}
    return replace(
        report,
        documents=job.starts[-1],
        chosen=len(chosen),
        corpora=corpora,
        examples=examples,
        distance_quantiles=quantiles,
    )


def _length(dataset: IndexedDataset, number: int) -> int:
    stop = dataset.num_tokens if number + 1 == dataset.num_documents else dataset.document_start(number + 1)
    return stop - dataset.document_start(number)
