"""From streams and a blend to the micro-batches of one data-parallel rank, read ahead by a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from megatron_cpt.data.loading.batch import Batch, DocumentOptions, make_batch
from megatron_cpt.data.loading.samples import read_samples
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.sampling.blend import BlendCursor

_POLL_SECONDS = 0.1  # how soon a worker that waits for room in the queue notices that it should stop


@dataclass(frozen=True)
class StepData:
    """All that one training step reads on one rank.

    Attributes:
        micro_batches: global_batch / (micro_batch * data_parallel_size) of them.
        num_tokens: tokens that all ranks together train on.
        counts: samples each source has given since the start of the run, this step's (of all ranks) included.
        state: the blend's state after this step, to be saved with it; what was read ahead is not in it.
    """

    micro_batches: list[Batch]
    num_tokens: int
    counts: dict[str, int]
    state: dict[str, Any]


class Loader:
    """Iterator over the steps of a run for one data-parallel rank.

    Every rank computes the same assignment of samples and reads its own. As in Megatron, micro-batch m of a step takes
    the samples [m * dp * micro, (m + 1) * dp * micro) and rank r the r-th run of `micro` among them; the order of
    samples over a step is therefore the same for every way to divide it.

    Args:
        streams: one a source, in the order of the cursor's `source_names`.
        cursor: where the run stands (its state already loaded); the loader owns it from the first step on.
        global_batch: samples a step, of all ranks; a function where it changes: from the samples that the run has read
            before a step to that step's.
        micro_batch: samples a forward pass on one rank; a function likewise.
        data_parallel_rank: this rank.
        data_parallel_size: how many there are.
        prefetch: steps read ahead, at least 1.
        vocab_size: refuse ids that are not below it; None: do not look.
        documents: what happens at the ends of documents.
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
    ) -> None:
        assert tuple(stream.name for stream in streams) == cursor.source_names, "streams in the cursor's order"
        assert 0 <= data_parallel_rank < data_parallel_size
        assert prefetch >= 1
        self._streams = tuple(streams)
        self._cursor = cursor
        self._global_batch = global_batch if callable(global_batch) else lambda _: global_batch
        self._micro_batch = micro_batch if callable(micro_batch) else lambda _: micro_batch
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._vocab_size = vocab_size
        self._documents = documents
        self._ready: queue.Queue[StepData | BaseException | None] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None
        self._end: BaseException | None = None  # what the worker ended with, once it was passed on

    def start(self) -> None:
        """Begins to read ahead; the first `next_step` does it otherwise."""
        if self._worker is None:
            worker = threading.Thread(target=self._work, name="data-loader", daemon=True)
            worker.start()
            self._worker = worker  # only now: `close` joins what it finds here

    def next_step(self) -> StepData:
        """The next step's data.

        Raises:
            StopIteration: the last phase is over.
            RefusedError: the data is damaged or holds ids beyond the vocabulary.
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
        """Stops the worker and waits for it, drops what was read ahead. May be called twice, and from any thread."""
        self._stop.set()
        if self._worker is not None:
            self._worker.join()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._end = self._end or StopIteration("the loader is closed")
        self._ready.put_nowait(None)  # wakes up a thread that waits for a step

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        return self.next_step()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        """The worker thread: one step after the other, then what it ended with."""
        last: BaseException | None = None
        try:
            while self._has_step() and not self._stop.is_set():
                self._put(self._read_step())
        except BaseException as error:  # noqa: BLE001 (raised again by the thread that asks for the next step)
            last = error
        self._put(last)

    def _put(self, item: StepData | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue

    def _has_step(self) -> bool:
        remaining = self._cursor.remaining
        return remaining > 0 and remaining >= self._global_batch(self._cursor.sample)

    def _read_step(self) -> StepData:
        global_batch, micro_batch = (size(self._cursor.sample) for size in (self._global_batch, self._micro_batch))
        assert global_batch % (micro_batch * self._size) == 0, "the global batch divides into micro-batches"
        sources, ks = self._cursor.next(global_batch)
        length = self._cursor.seq_length
        # (micro-batches, ranks, micro): the order of samples above, cut into each rank's share
        shape = (-1, self._size, micro_batch)
        own_sources, own_ks = sources.reshape(shape)[:, self._rank], ks.reshape(shape)[:, self._rank]
        samples = read_samples(self._streams, own_sources.ravel(), own_ks.ravel(), self._vocab_size, length)
        micro_batches = [
            make_batch(samples[first : first + micro_batch], micro_sources, self._documents)
            for first, micro_sources in zip(range(0, len(samples), micro_batch), own_sources, strict=True)
        ]
        num_tokens = global_batch * micro_batches[0].tokens.shape[1]
        return StepData(micro_batches, num_tokens, self._cursor.counts, self._cursor.state_dict())


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
    """This rank's micro-batches of a validation set: the same samples each time, however the work is divided.

    The set is the stream's first `num_samples` samples, or its first epoch if that is less: no sample counts twice.
    Every rank gets the same number of micro-batches; what that takes beyond the set are the stream's next
    samples with a loss mask of 0, so the mean over all masks is that of the set. `Batch.sources` is 0 throughout.

    Args:
        stream: the validation source.
        num_samples: size of the set.
        micro_batch: samples a forward pass on one rank.
        data_parallel_rank: this rank.
        data_parallel_size: how many there are.
        vocab_size: refuse ids that are not below it; None: do not look.
        documents: what happens at the ends of documents.

    Raises:
        RefusedError: the data is damaged or holds ids beyond the vocabulary.
    """
    num_samples = min(num_samples, stream.samples_per_epoch)
    block = micro_batch * data_parallel_size
    for first in range(data_parallel_rank * micro_batch, -(-num_samples // block) * block, block):
        ks = np.arange(first, first + micro_batch)
        sources = np.zeros_like(ks)
        batch = make_batch(read_samples([stream], sources, ks, vocab_size), sources, documents)
        batch.loss_mask[ks >= num_samples] = 0.0
        yield batch
