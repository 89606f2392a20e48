"""Call of `mine` with everything resolved: datasets, tokenizer, embedder and the vectors of the queries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.mining.embedders import Embedder, load_embedder
from megatron_cpt.data.mining.ranges import RANGE_DOCUMENTS, DocumentRange, Engine, MiningPlan, cut_ranges
from megatron_cpt.data.mining.search import Method
from megatron_cpt.data.mining.texts import corpus_prefixes, corpus_texts, find_tokenizer, read_queries
from megatron_cpt.data.preprocess.inputs import InputFiles, Shard
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.data.tokenfile.document_list import is_document_list
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.reader import IndexedDataset, open_with_one_dtype
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.errors import UserError
from megatron_cpt.files.checksum import Checksum
from megatron_cpt.files.resumable import DurableJournal, ResumableFolder

JOURNAL = "journal.jsonl"
_MOST = int(np.iinfo(np.int32).max)  # documents of a range are int32 in its result
_MOST_SHARDS = 1_000_000
Overlap = Literal["refuse", "drop", "keep"]


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """Everything about a call of `mine` that has a default.

    Attributes:
        tokenizer: KIND:PATH for datasets without a sidecar; text files of the corpus are encoded with it.
        query_keys: fields of the lines of text files of queries, joined by line ends.
        corpus_key: field of the lines of text files of the corpus.
        k: documents per query; at most all of the corpus.
        characters: characters of a document, and of a query, that are embedded.
        method: see `find_nearest`, as for `recall`.
        held_out: datasets or JSON Lines that no mined document may overlap with, see `held_out_documents`.
        held_out_keys: fields of the lines of JSON Lines.
        overlap: what to do with mined documents that share 13 consecutive ids with a held-out document.
        workers: processes; None: one per core.
        shard: mine only this part of the corpus; `join` makes the output of all parts.
        join: number of shards whose results are joined, in place of mining.
        range_documents: documents per range, the unit of work, of resuming and of sharding.
        overwrite: replace an output that exists.
        restart: discard the progress of an interrupted call.
        engine: what mines the ranges; None: processes on this machine. See `ranges.py`.
        progress: called after each range with (documents done, documents in total).
        notify: called with a sentence about each decision and each step that takes long.
    """

    tokenizer: str | None = None
    query_keys: Sequence[str] = ("text",)
    corpus_key: str = "text"
    k: int = 50
    characters: int = 1000
    method: Method = "flat"
    recall: float = 0.97
    held_out: Sequence[str] = ()
    held_out_keys: Sequence[str] = ("text",)
    overlap: Overlap = "refuse"
    workers: int | None = None
    shard: Shard | None = None
    join: int | None = None
    range_documents: int = RANGE_DOCUMENTS
    overwrite: bool = False
    restart: bool = False
    engine: Engine | None = None
    progress: Callable[[int, int], None] = lambda done, total: None
    notify: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        for name in ("k", "characters", "range_documents", "workers", "join"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value}; give a whole number of at least 1")
            most = _MOST_SHARDS if name == "join" else _MOST
            if value is not None and name != "k" and value > most:  # k is cut to the corpus
                raise UserError(f"{name}: {value}; give a whole number of at most {most}")
        if self.shard is not None and self.shard.count > _MOST_SHARDS:
            raise UserError(f"shard: {self.shard.count} shards; give at most {_MOST_SHARDS}")
        if not 0 < self.recall <= 1:
            raise UserError(f"recall: {self.recall}; give a share above 0 and at most 1")
        for name, choices in (("method", get_args(Method)), ("overlap", get_args(Overlap))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: {getattr(self, name)!r}; give one of {', '.join(choices)}")
        if self.shard is not None and self.join is not None:
            raise UserError("join: do not combine it with a shard; first mine all shards, then join them")


@dataclass(frozen=True)
class MiningJob:
    """Call of `mine` with everything resolved.

    Attributes:
        query_texts: texts of all queries.
        used: int64, the queries that have a vector.
    """

    output: str
    datasets: list[IndexedDataset]
    tokenizer: Tokenizer
    embedder: Embedder
    query_texts: list[str]
    used: npt.NDArray[np.int64]
    plan: MiningPlan
    options: MiningOptions

    @property
    def starts(self) -> list[int]:
        """Number of each dataset's first document over all datasets, then the total."""
        return [0, *accumulate(dataset.num_documents for dataset in self.datasets)]

    def settings(self, shard: Shard | None) -> dict[str, Any]:
        """Return everything that decides the results of a shard's ranges."""
        texts = Checksum()
        for text in self.query_texts:
            texts.update(f"{len(text)} {text}".encode(errors="surrogatepass"))
        return {
            "corpus": [[each.num_documents, fingerprint([each])] for each in self.datasets],
            "tokenizer": self.tokenizer.fingerprint,
            "queries": texts.hexdigest(),
            "embedder": self.embedder.digest,
            "k": self.plan.k,
            "characters": self.plan.characters,
            "method": self.plan.method,
            "recall": self.plan.recall,
            "range_documents": self.options.range_documents,
            "shard": [shard.index, shard.count] if shard else None,
        }

    def ranges(self, shard: Shard | None) -> list[DocumentRange]:
        """Return the ranges of a shard."""
        counts = [dataset.num_documents for dataset in self.datasets]
        return cut_ranges(counts, shard, self.options.range_documents)


@contextlib.contextmanager
def as_datasets(corpus: Sequence[str], output: str, options: MiningOptions) -> Iterator[list[str]]:
    """Yield the prefixes of the corpus; text files are encoded as one dataset for the length of the block.

    Raises:
        UserError: text files are given for a list or a shard, or without a tokenizer.
    """
    texts, prefixes = corpus_texts(corpus), corpus_prefixes(corpus)
    if not texts:
        yield prefixes
        return
    files = InputFiles.of(texts)
    if is_document_list(output) or options.shard is not None or options.join is not None:
        what = "a document list names datasets" if is_document_list(output) else "shards read the same datasets"
        raise UserError(f"corpus {texts[0]}: {what}; encode the text first: megatron-cpt preprocess --append-eod")
    if options.tokenizer is None:
        raise UserError(f"corpus {texts[0]}: text is encoded for the output; give --tokenizer KIND:PATH")
    prefix = f"{output}.mine-corpus"
    facts = {"files": files.settings(), "tokenizer": load_tokenizer(options.tokenizer).fingerprint}
    settings = {**facts, "key": options.corpus_key}
    with ResumableFolder(
        Path(f"{prefix}.mine"),
        settings,
        progress_file=JOURNAL,
        should_restart=options.restart,
        should_discard_other_settings=True,
    ) as folder:
        journal = DurableJournal(folder.path / JOURNAL)
        if not journal.lines:
            options.notify(f"encoding {len(files.paths)} text files of the corpus")
            encoding = PreprocessOptions(
                key=options.corpus_key,
                append_eod=load_tokenizer(options.tokenizer).eod_id is not None,
                workers=options.workers,
                overwrite=True,
                restart=options.restart,
                notify=options.notify,
            )
            preprocess(files.paths, prefix, tokenizer=options.tokenizer, options=encoding)
            journal.record({"encoded": True})
        yield [*prefixes, prefix]
        folder.remove()
    for ending in (".bin", ".idx", ".json"):
        Path(f"{prefix}{ending}").unlink(missing_ok=True)


def prepare_mining(
    queries: Sequence[str], prefixes: Sequence[str], output: str, spec: str, options: MiningOptions
) -> MiningJob:
    """Open the datasets and embed the queries.

    Args:
        prefixes: datasets of the corpus.
        spec: KIND:DIR of the embedder.

    Raises:
        UserError: a file is missing, there are no documents, or the embedder knows no query.
        RefusedError: a file is damaged, or tokenizers differ.
    """
    datasets = (
        [IndexedDataset(prefix) for prefix in prefixes] if is_document_list(output) else open_with_one_dtype(prefixes)
    )
    num_documents = sum(dataset.num_documents for dataset in datasets)
    if not num_documents:
        raise UserError(f"corpus {', '.join(prefixes)}: has no documents; there is nothing to mine")
    tokenizer_spec, tokenizer = find_tokenizer(datasets, options.tokenizer)
    embedder = load_embedder(spec)
    texts = read_queries(queries, options.tokenizer, options.query_keys)
    vectors = embedder.embed([text[: options.characters] for text in texts])
    used = np.flatnonzero(vectors.any(axis=1)).astype(np.int64)
    if not used.size:
        raise UserError(f"queries {', '.join(queries)}: the embedder knows no word of any of them; choose another one")
    if options.k > num_documents:
        options.notify(f"k is {num_documents:,} instead of {options.k:,}: the corpus has no more documents")
    plan = MiningPlan(
        prefixes=tuple(prefixes),
        tokenizer=tokenizer_spec,
        embedder=spec,
        queries=np.ascontiguousarray(vectors[used]),
        characters=options.characters,
        k=min(options.k, num_documents),
        method=options.method,
        recall=options.recall,
    )
    return MiningJob(output, datasets, tokenizer, embedder, texts, used, plan, options)
