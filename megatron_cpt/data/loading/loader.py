"""Loader of the micro-batches of one data-parallel rank; a background thread reads ahead."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cpt.data.loading.batch import Batch, DocumentOptions, make_batch
from megatron_cpt.data.loading.samples import read_document_ends, read_samples
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.sampling.blend import BlendCursor

if TYPE_CHECKING:
    from megatron_cpt.data.loading.teacher_targets import CachedTeacher  # its imports cost a start 10 ms

_POLL_SECONDS = 0.1  # a worker that waits for a full queue checks this often whether it should stop


@dataclass(frozen=True)
class StepData:
    """Data of one training step on one rank.

    Attributes:
        micro_batches: global_batch / (micro_batch * data_parallel_size) micro-batches.
        num_tokens: tokens that all ranks together train on in this step.
        counts: samples per source that all ranks have read from the start of the run to the end of this step.
        state: the blend's state after this step, for its checkpoint; it does not include what was read ahead.
        uploaded: result of the loader's `upload`; None without one.
    """

    micro_batches: list[Batch]
    num_tokens: int
    counts: dict[str, int]
    state: dict[str, Any]
    uploaded: Any = None


class Loader:
    """Iterator over the steps of a run for one data-parallel rank.

    Every rank computes the same assignment of samples and reads its own share. As in Megatron-LM, the order of samples
    in a step does not depend on how the step is divided. Example: a step of 8 samples, 2 ranks, micro-batches of 2:

        samples        0 1    2 3    4 5    6 7
        rank           0      1      0      1
        micro-batch    0      0      1      1

    Args:
        streams: one per source, in the order of the cursor's `source_names`.
        cursor: position in the run, with its state loaded; only the loader may use it once reading has started.
        global_batch: samples per step over all ranks. If it changes: a function of the number of samples that the run
            has read before a step.
        micro_batch: samples per forward pass on one rank; may be a function as well.
        prefetch: steps to read ahead, at least 1.
        vocab_size: ids must be below it; None: ids are not checked.
        teacher: cached teacher whose targets every micro-batch gets; None: no targets are read.
        upload: called in the loader's thread with the micro-batches of each step, for example to copy them to a GPU.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        cursor: BlendCursor,
        *,
        global_batch: int | Callable[[int], int],
        micro_batch: int | Callable[[int], int],
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        prefetch: int = 2,
        vocab_size: int | None = None,
        documents: DocumentOptions = DocumentOptions(),  # noqa: B008 - frozen
        teacher: CachedTeacher | None = None,
        upload: Callable[[list[Batch]], Any] = lambda batches: None,
    ) -> None:
        assert tuple(stream.name for stream in streams) == cursor.source_names, "streams in the cursor's order"
        assert 0 <= data_parallel_rank < data_parallel_size
        assert prefetch >= 1
        self._streams = tuple(streams)
        self._cursor = cursor
        self._global_batch = global_batch if callable(global_batch) else lambda _: global_batch
        self._micro_batch = micro_batch if callable(micro_batch) else lambda _: micro_batch
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._vocab_size, self._documents, self._upload = vocab_size, documents, upload
        self._teacher = teacher
        self._ready: queue.Queue[StepData | BaseException | None] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self._end: BaseException | None = None  # the worker's error or StopIteration, once `next_step` has raised it

    def start(self) -> None:
        """Start reading ahead; otherwise the first `next_step` does."""
        if self._worker is None:
            worker = threading.Thread(target=self._work, name="data-loader", daemon=True)
            worker.start()
            self._worker = worker  # only once it runs, because `close` joins it

    def next_step(self) -> StepData:
        """Return the data of the next step.

        Raises:
            StopIteration: the last phase is over.
            RefusedError: a file is damaged, or has ids outside the vocabulary.
        """
        self.start()
        if self._end is not None:
            raise self._end
        item = self._ready.get()
        if isinstance(item, StepData):
            return item
        self._end = item if item is not None else StopIteration("no step is left: the last phase is over")
        raise self._end

    def close(self) -> None:
        """Stop the worker, wait for it, and drop what it read ahead. Safe to call twice, and from any thread."""
        self._stop.set()
        if self._worker is not None:
            self._worker.join()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._end = self._end or StopIteration("the loader is closed")
        self._ready.put_nowait(None)  # wakes a thread that waits in `next_step`

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        return self.next_step()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self) -> None:
        """Put steps into the queue until the run ends, then None; or the error that stopped the worker."""
        last: BaseException | None = None
        try:
            while not self._stop.is_set():
                if not 0 < self._cursor.remaining >= self._global_batch(self._cursor.sample):
                    break
                self._put(self._read_step())
        except BaseException as error:  # noqa: BLE001 (`next_step` raises it again)
            last = error
        self._put(last)

    def _put(self, item: StepData | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue

    def _read_step(self) -> StepData:
        global_batch, micro_batch = (size(self._cursor.sample) for size in (self._global_batch, self._micro_batch))
        assert global_batch % (micro_batch * self._size) == 0, "the global batch divides into micro-batches"
        sources, indices = self._cursor.next(global_batch)
        length = self._cursor.seq_length
        shape = (-1, self._size, micro_batch)  # (micro-batches, ranks, samples), see the example in the class
        own_sources, own_indices = sources.reshape(shape)[:, self._rank], indices.reshape(shape)[:, self._rank]
        wanted = (self._streams, own_sources.ravel(), own_indices.ravel())
        samples = read_samples(*wanted, self._vocab_size, length)
        ends = read_document_ends(*wanted, length) if self._documents.need_ends else None
        targets = self._teacher.read(*wanted, length) if self._teacher is not None else None
        micro_batches = [
            make_batch(
                samples[rows],
                micro_sources,
                self._documents,
                None if ends is None else ends[rows],
                None if targets is None else targets.rows(rows),
            )
            for micro_sources, rows in zip(own_sources, _slices(len(samples), micro_batch), strict=True)
        ]
        num_tokens = global_batch * micro_batches[0].tokens.shape[1]
        uploaded = self._upload(micro_batches)
        return StepData(micro_batches, num_tokens, self._cursor.counts, self._cursor.state_dict(), uploaded)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]


def validation_batches(
    stream: TokenStream,
    *,
    num_samples: int,
    micro_batch: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    vocab_size: int | None = None,
    documents: DocumentOptions = DocumentOptions(),  # noqa: B008 - frozen
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of a validation set; the set does not depend on how many ranks share it.

    The set is the stream's first `num_samples` samples, or its first epoch if that is shorter: no sample counts twice.
    Every rank gets the same number of micro-batches. If the set does not fill them, the stream's next samples follow,
    with a loss mask of 0. Example: 5 samples on 2 ranks, micro-batches of 2: rank 0 gets samples 0 1 and 4 5, rank 1
    gets 2 3 and 6 7; samples 5, 6 and 7 are masked.

    Args:
        micro_batch: samples per forward pass on one rank.
        vocab_size: ids must be below it; None: ids are not checked.

    Yields:
        Micro-batches whose `sources` are all 0.

    Raises:
        RefusedError: a file is damaged, or has ids outside the vocabulary.
    """
    num_samples = min(num_samples, stream.samples_per_epoch)
    block = micro_batch * data_parallel_size
    for first in range(data_parallel_rank * micro_batch, -(-num_samples // block) * block, block):
        indices = np.arange(first, first + micro_batch)
        sources = np.zeros_like(indices)
        ends = read_document_ends([stream], sources, indices) if documents.need_ends else None
        batch = make_batch(read_samples([stream], sources, indices, vocab_size), sources, documents, ends)
        batch.loss_mask[indices >= num_samples] = 0.0
        yield batch
