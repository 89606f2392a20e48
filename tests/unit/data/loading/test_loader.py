"""Loader: one order for any number of ranks, exact resume despite prefetching, and errors reach the caller."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.loading.loader import Loader, StepData, validation_batches
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError
from megatron_cpt.sampling.blend import BlendCursor, PhaseBlend

S, GLOBAL, STEPS = 8, 12, 5
NAMES = ["web", "code"]
PHASES = [
    PhaseBlend("general", 0, 3 * GLOBAL, {"web": 0.7, "code": 0.3}),
    PhaseBlend("code", 3 * GLOBAL, 2 * GLOBAL, {"code": 1.0}),
]


@pytest.fixture
def streams(counting_dataset) -> list[TokenStream]:
    """Two sources without a common token; the run reads less than one epoch of web and more than two of code."""
    web = [counting_dataset("web0", 300), counting_dataset("web1", 100, 1000)]
    return [
        TokenStream("web", web, seq_length=S, seed=5),
        TokenStream("code", [counting_dataset("code", 150, 2000)], seq_length=S, seed=5),
    ]


def load(
    streams: Sequence[TokenStream], *, state: dict | None = None, num_steps: int = STEPS, **division
) -> list[StepData]:
    cursor = BlendCursor(PHASES, NAMES)
    if state is not None:
        cursor.load_state_dict(state)
    with Loader(streams, cursor, global_batch=GLOBAL, **({"micro_batch": 1} | division)) as loader:
        return [loader.next_step() for _ in range(num_steps)]


def expected_rows(streams: Sequence[TokenStream]) -> list[list[list[int]]]:
    """Return the samples of each global batch, read directly from the blend and the streams."""
    sources, ks = BlendCursor(PHASES, NAMES).next(STEPS * GLOBAL)
    rows = [streams[source].read(k).tolist() for source, k in zip(sources, ks, strict=True)]
    return [rows[i : i + GLOBAL] for i in range(0, len(rows), GLOBAL)]


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 3), (1, 12), (2, 1), (2, 3), (3, 4), (4, 1), (6, 2), (12, 1)])
def test_any_division_gives_the_same_samples_in_the_same_order(streams, dp, micro):
    ranks = [
        load(streams, micro_batch=micro, data_parallel_rank=rank, data_parallel_size=dp, prefetch=1 + rank % 3)
        for rank in range(dp)
    ]
    for step, rows in enumerate(expected_rows(streams)):
        seen = []
        for micro_batches in zip(*(rank[step].micro_batches for rank in ranks), strict=True):
            for batch in micro_batches:  # micro-batch m: rank 0's run, then rank 1's, ...
                assert batch.tokens.shape == (micro, S)
                seen += [
                    [*tokens, labels[-1]]
                    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
                ]
                assert [token >= 2000 for token in batch.tokens[:, 0]] == batch.sources.astype(bool).tolist()
        assert seen == rows
        assert len({str(rank[step].state) for rank in ranks}) == 1


def test_the_disk_is_told_all_samples_of_a_step_before_the_first_is_read(streams, monkeypatch):
    calls: list[tuple[str, str, list[int]]] = []

    def spied(name: str, original: Callable[..., object]):
        def spy(self, starts, what):
            calls.append((name, self.prefix, list(starts)))
            return original(self, starts, what)

        return spy

    for name in ("will_read", "read_rows"):
        monkeypatch.setattr(IndexedDataset, name, spied(name, getattr(IndexedDataset, name)))
    load(streams, num_steps=1, data_parallel_rank=1, data_parallel_size=3, prefetch=1)
    files = len({prefix for name, prefix, _ in calls if name == "read_rows"})
    assert files > 1
    assert [name for name, *_ in calls[: 2 * files]] == ["will_read"] * files + ["read_rows"] * files
    told, read = ([call[1:] for call in calls[: 2 * files] if call[0] == name] for name in ("will_read", "read_rows"))
    assert told == read
    assert sum(len(starts) for _, starts in read) == 4


def test_counts_and_state_are_those_of_the_step_not_of_the_prefetch(streams):
    steps = load(streams, prefetch=4)
    cursor = BlendCursor(PHASES, NAMES)
    for step in steps:
        cursor.next(GLOBAL)
        assert step.state == cursor.state_dict()
        assert step.counts == cursor.counts


@pytest.mark.parametrize("resumed_at", range(STEPS))
def test_resume_is_exact(streams, resumed_at):
    whole = load(streams, prefetch=3)
    state = whole[resumed_at - 1].state if resumed_at else None
    # divided differently from there on
    rest = load(streams, state=state, num_steps=STEPS - resumed_at, micro_batch=12)
    for old, new in zip(whole[resumed_at:], rest, strict=True):
        assert np.concatenate([b.tokens for b in old.micro_batches]).tolist() == new.micro_batches[0].tokens.tolist()
        assert old.state == new.state


def test_ends_with_the_last_phase(streams):
    with Loader(streams, BlendCursor(PHASES, NAMES), global_batch=GLOBAL, micro_batch=12) as loader:
        assert len(list(loader)) == STEPS
        with pytest.raises(StopIteration):
            loader.next_step()


def test_ids_beyond_the_vocabulary_are_named(make_dataset, counting_dataset):
    documents = [list(range(20)), [*range(30), 300, *range(49)]]  # the bad token is number 50 of the file
    bad = TokenStream("web", [make_dataset("bad", documents)], seq_length=S, seed=1)
    cursor = BlendCursor([PhaseBlend("p", 0, 1000, {"web": 1.0})], ["web"])
    with Loader([bad], cursor, global_batch=4, micro_batch=1, vocab_size=300) as loader:
        with pytest.raises(RefusedError) as caught:
            list(loader)
        message = str(caught.value)
        assert "source web" in message
        assert "bad.bin: document 1, token 50 of the file" in message
        assert "id 300 is outside of the vocabulary of 300" in message
        with pytest.raises(RefusedError):  # and again, for who asks again
            loader.next_step()


def test_negative_ids_are_refused(make_dataset):
    stream = TokenStream("web", [make_dataset("bad", [[1] * 30 + [-5] * 30], "<i4")], seq_length=S, seed=1)
    cursor = BlendCursor([PhaseBlend("p", 0, 12, {"web": 1.0})], ["web"])
    with (
        Loader([stream], cursor, global_batch=12, micro_batch=12, vocab_size=300) as loader,
        pytest.raises(RefusedError, match="id -5"),
    ):
        loader.next_step()


def test_a_file_cut_during_the_run(streams, tmp_path):
    with Loader(streams, BlendCursor(PHASES, NAMES), global_batch=GLOBAL, micro_batch=1, prefetch=1) as loader:
        loader.next_step()
        os.truncate(tmp_path / "code.bin", 100)
        with pytest.raises(RefusedError, match=r"code\.bin: was truncated from 600 to 100 bytes"):
            list(loader)


def test_without_end_of_document_ids_the_index_tells_where_documents_end(write_pair, tmp_path):
    """Documents of 7 and 5 tokens in turn, without an id that ends them; as with such an id in their last place."""
    lengths = [7, 0, 5] * 40
    plain = [np.arange(1, length + 1) for length in lengths]
    ended = [np.append(ids[:-1], 99) if len(ids) else ids for ids in plain]
    options = {"reset_attention": True, "reset_positions": True, "eod_loss": False}
    batches = []
    for name, documents, eod_id in (("plain", plain, None), ("ended", ended, 99)):
        stream = TokenStream("web", [write_pair(tmp_path / name, documents)], seq_length=16, seed=1)
        cursor = BlendCursor([PhaseBlend("all", 0, 24, {"web": 1.0})], ["web"])
        documents_options = DocumentOptions(eod_id, **options)
        with Loader([stream], cursor, global_batch=12, micro_batch=12, documents=documents_options) as loader:
            batches.append([step.micro_batches[0] for step in loader])
        batches[-1] += validation_batches(stream, num_samples=8, micro_batch=4, documents=documents_options)
    for one, other in zip(*batches, strict=True):
        assert (one.loss_mask == other.loss_mask).all()
        assert (one.position_ids == other.position_ids).all()
        assert one.attention_documents is not None
        assert (one.attention_documents == other.attention_documents).all()
        assert (one.loss_mask == 0).any()


def test_options_reach_the_batches(streams):
    eod_id = int(streams[0].read(0)[3])
    step = load(
        streams, num_steps=1, micro_batch=12, documents=DocumentOptions(eod_id, reset_attention=True, eod_loss=False)
    )[0]
    batch = step.micro_batches[0]
    ends = batch.tokens == eod_id
    assert ends.any()
    assert (batch.loss_mask == ~ends).all()
    assert batch.attention_documents is not None


class TestClose:
    def test_ends_the_worker_however_full_the_queue(self, streams):
        loader = Loader(streams, BlendCursor(PHASES, NAMES), global_batch=GLOBAL, micro_batch=1, prefetch=1)
        loader.next_step()
        worker = next(thread for thread in threading.enumerate() if thread.name == "data-loader")
        loader.close()
        assert not worker.is_alive()
        loader.close()
        with pytest.raises(StopIteration):
            loader.next_step()

    def test_before_the_first_step(self, streams):
        loader = Loader(streams, BlendCursor(PHASES, NAMES), global_batch=GLOBAL, micro_batch=1)
        loader.close()
        with pytest.raises(StopIteration):
            loader.next_step()

    def test_wakes_up_who_waits(self, streams, monkeypatch):
        reading, release = threading.Event(), threading.Event()

        def slow_read(dataset, starts, rows):
            reading.set()
            release.wait()

        monkeypatch.setattr(IndexedDataset, "read_rows", slow_read)
        loader = Loader(streams, BlendCursor(PHASES, NAMES), global_batch=GLOBAL, micro_batch=1)
        ended = []
        waiter = threading.Thread(target=lambda: ended.append(list(loader)))
        waiter.start()
        assert reading.wait(10)
        closer = threading.Thread(target=loader.close)
        closer.start()
        release.set()
        for thread in (waiter, closer):
            thread.join(10)
            assert not thread.is_alive()
        assert len(ended) == 1


class TestValidation:
    @staticmethod
    def rows(stream, **kwargs) -> list[list[int]]:
        """Return the unmasked samples of all ranks, in the order of the stream."""
        size = kwargs.get("data_parallel_size", 1)
        ranks = [list(validation_batches(stream, data_parallel_rank=rank, **kwargs)) for rank in range(size)]
        assert len({len(rank) for rank in ranks}) == 1
        rows = []
        for batches in zip(*ranks, strict=True):
            for batch in batches:
                counts = batch.loss_mask.all(axis=1)
                assert (counts == batch.loss_mask.any(axis=1)).all()
                rows += batch.tokens[counts].tolist()
        return rows

    @pytest.mark.parametrize(("micro", "size"), [(1, 1), (2, 3), (5, 1), (4, 4)])
    def test_same_samples_however_divided(self, streams, micro, size):
        kwargs = {"num_samples": 24, "micro_batch": micro, "data_parallel_size": size}
        expected = [streams[0].read(k)[:-1].tolist() for k in range(24)]
        for _ in range(2):  # the same set each time
            assert self.rows(streams[0], **kwargs) == expected

    def test_a_small_set_counts_once(self, streams):
        n = streams[1].samples_per_epoch
        assert n == 18
        rows = self.rows(streams[1], num_samples=60, micro_batch=4, data_parallel_size=2)
        assert rows == [streams[1].read(k)[:-1].tolist() for k in range(n)]

    def test_vocabulary(self, streams):
        with pytest.raises(RefusedError, match="source web"):
            list(validation_batches(streams[0], num_samples=36, micro_batch=2, vocab_size=100))
