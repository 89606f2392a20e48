"""Work per range of documents, and the engines that do it.

A corpus is cut into ranges of consecutive documents of one dataset. The work on a range is a pure function:

    miner = RangeMiner(plan)        # once per process: loads the embedder and the tokenizer
    content = miner(document_range) # bytes: the nearest documents of the range for each query

`MiningPlan` and `DocumentRange` can be pickled, and `content` depends on nothing else: not on the process, the order
of the ranges, or other ranges. So every engine gives the same bytes. An engine is a function

    engine(plan, ranges) -> iterator of (document_range, content), in any order

that may run anywhere the datasets and models have the same paths: `run_here`, `run_in_processes` and `run_on_ray`.
`mine` writes each content to its own file of the work folder and merges the files when all are there; see
`encode_result` for their format.
"""

from __future__ import annotations

import multiprocessing
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from megatron_cpt.data.mining.embedders import Vectors, load_embedder
from megatron_cpt.data.mining.search import Method, Neighbors, find_nearest, sample_queries
from megatron_cpt.data.mining.texts import DocumentTexts
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.preprocess.workers import WorkerLostError
from megatron_cpt.data.ray_engine import connect_ray, enter_folder
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.files.worker_process import prepare_worker

RANGE_DOCUMENTS = 1 << 14
_TEXTS = 1 << 10  # documents whose texts are in memory at a time
_RANGES_PER_WORKER = 2  # in flight: one being mined, one waiting


@dataclass(frozen=True)
class MiningPlan:
    """Everything that the work on a range needs.

    Attributes:
        prefixes: datasets of the corpus.
        tokenizer: KIND:PATH.
        embedder: KIND:DIR.
        queries: float32 (num_queries, dimensions), of length 1.
        characters: characters of a document that are embedded.
        k: neighbors per query.
        method, recall: see `find_nearest`.
    """

    prefixes: tuple[str, ...]
    tokenizer: str
    embedder: str
    queries: Vectors
    characters: int
    k: int
    method: Method
    recall: float


@dataclass(frozen=True, order=True)
class DocumentRange:
    """Consecutive documents [first, stop) of dataset number `dataset`."""

    dataset: int
    first: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the file with the range's result."""
        return f"{self.dataset:05}-{self.first:012}-{self.stop:012}.near"


Engine = Callable[[MiningPlan, Sequence[DocumentRange]], Iterator[tuple[DocumentRange, bytes]]]


def cut_ranges(
    num_documents: Sequence[int], shard: Shard | None = None, range_documents: int = RANGE_DOCUMENTS
) -> list[DocumentRange]:
    """Return the ranges of a shard, in order; all shards together have all ranges, each once.

    Example: datasets of 5 and 2 documents in ranges of 2: [0, 2), [2, 4), [4, 5) of the first, [0, 2) of the second.
    """
    ranges = [
        DocumentRange(number, first, min(first + range_documents, count))
        for number, count in enumerate(num_documents)
        for first in range(0, count, range_documents)
    ]
    first, stop = (shard or Shard()).interval(len(ranges))
    return ranges[first:stop]


class RangeMiner:
    """Function from a range to its result; see the module's text."""

    def __init__(self, plan: MiningPlan) -> None:
        self._plan = plan
        self._embedder = load_embedder(plan.embedder)
        self._tokenizer = load_tokenizer(plan.tokenizer)
        self._texts: dict[int, DocumentTexts] = {}

    def __call__(self, work: DocumentRange) -> bytes:
        """Embed the documents of a range and search among them; return the result, see `encode_result`."""
        plan = self._plan
        if work.dataset not in self._texts:
            dataset = IndexedDataset(plan.prefixes[work.dataset])
            self._texts = {work.dataset: DocumentTexts(dataset, self._tokenizer)}
        texts = self._texts[work.dataset]
        vectors = np.empty((work.stop - work.first, plan.queries.shape[1]), np.float32)
        for first in range(work.first, work.stop, _TEXTS):
            stop = min(first + _TEXTS, work.stop)
            batch = texts.starts(first, stop, plan.characters)
            vectors[first - work.first : stop - work.first] = self._embedder.embed(batch)
        return encode_result(*find_nearest(vectors, plan.queries, plan.k, plan.method, plan.recall))


def encode_result(found: Neighbors, exact: Neighbors) -> bytes:
    """Return the content of a range's file.

    It has the neighbors of all queries, then exact ones of `sample_queries`; each as float32 distances and int32
    documents, row by row. Documents count from 0 in the range.
    """
    arrays = [(each.distances.astype("<f4"), each.documents.astype("<i4")) for each in (found, exact)]
    return b"".join(array.tobytes() for pair in arrays for array in pair)


def decode_result(content: bytes, num_queries: int, k: int, first: int) -> tuple[Neighbors, Neighbors]:
    """Return what was given to `encode_result`, with documents that count from `first` instead of 0."""
    results, offset = [], 0
    for count in (num_queries, len(sample_queries(num_queries))):
        size = count * k
        distances = np.frombuffer(content, "<f4", size, offset).reshape(count, k)
        documents = np.frombuffer(content, "<i4", size, offset + 4 * size).reshape(count, k).astype(np.int64)
        results.append(Neighbors(distances, np.where(documents < 0, documents, documents + first)))
        offset += 8 * size
    assert offset == len(content)
    return results[0], results[1]


def run_here(plan: MiningPlan, ranges: Sequence[DocumentRange]) -> Iterator[tuple[DocumentRange, bytes]]:
    """Mine the ranges in this process."""
    miner = RangeMiner(plan)
    return ((work, miner(work)) for work in ranges)


def run_in_processes(workers: int) -> Engine:
    """Return the engine that mines ranges in this many processes, or in this process for 1.

    Raises:
        WorkerLostError: from the iterator: a worker was killed from outside, most likely because memory ran out.
    """

    def run(plan: MiningPlan, ranges: Sequence[DocumentRange]) -> Iterator[tuple[DocumentRange, bytes]]:
        context = multiprocessing.get_context("spawn")
        count = min(workers, len(ranges))
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(plan,))
        in_flight: deque[tuple[DocumentRange, Future[bytes]]] = deque()
        try:
            for work in ranges:
                in_flight.append((work, pool.submit(_mine_in_worker, work)))
                if len(in_flight) == count * _RANGES_PER_WORKER:
                    done, future = in_flight.popleft()
                    yield done, future.result()
            while in_flight:
                done, future = in_flight.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise WorkerLostError(
                "a worker process was killed from outside or ran out of memory; run the same command again to resume, "
                "with fewer --workers if memory is short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    return run_here if workers == 1 else run


def run_on_ray(address: str | None, num_cpus: int | None) -> Engine:
    """Return the engine that mines ranges as tasks of a Ray cluster.

    Every node needs the datasets, the tokenizer and the embedder under the same paths.

    Args:
        address: address of a running cluster; None: one is started on this machine.
        num_cpus: CPUs to use; None: all of the cluster or machine.

    Raises:
        RayFailedError: from the iterator: Ray does not start, or the worker of a range died too often.
        UserError: from the iterator: there is no cluster at the address, or a node lacks the folder of the command.
    """

    def run(plan: MiningPlan, ranges: Sequence[DocumentRange]) -> Iterator[tuple[DocumentRange, bytes]]:
        with connect_ray(address, num_cpus=num_cpus) as cluster:
            common = (uuid.uuid4().hex, os.getcwd(), plan)
            in_flight = _RANGES_PER_WORKER * cluster.num_cpus
            contents = cluster.map_in_order(mine_on_ray, ranges, common, in_flight=in_flight)
            yield from zip(ranges, contents, strict=True)

    return run


_ray_miner: tuple[str, RangeMiner] | None = None  # run and its miner, set in Ray's worker processes only


def mine_on_ray(work: DocumentRange, run: str, folder: str, plan: MiningPlan) -> bytes:
    """Mine a range in a worker process of Ray, which keeps the miner of one run."""
    global _ray_miner
    if _ray_miner is None or _ray_miner[0] != run:
        enter_folder(folder)
        _ray_miner = (run, RangeMiner(plan))
    return _ray_miner[1](work)


_worker: tuple[MiningPlan, list[RangeMiner]] | None = None  # set in worker processes only


def _start_worker(plan: MiningPlan) -> None:
    global _worker
    prepare_worker()
    _worker = (plan, [])


def _mine_in_worker(work: DocumentRange) -> bytes:
    assert _worker is not None
    plan, miners = _worker
    if not miners:  # not in the initializer: there an error would look like a lost worker
        miners.append(RangeMiner(plan))
    return miners[0](work)


def default_workers(num_ranges: int) -> int:
    """Return one worker per core, but not more than there are ranges."""
    return max(1, min(len(os.sched_getaffinity(0)), num_ranges))
