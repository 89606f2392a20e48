"""Sequence length that changes at a phase: nothing is read twice, and restarts do not change the order."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data.loading.fim import FillInMiddle
from megatron_cpt.data.loading.loader import Loader
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.errors import RefusedError
from megatron_cpt.planning import SpanGrid
from megatron_cpt.sampling.blend import BlendCursor, PhaseBlend

LONG = 16
NAMES = ["web", "code"]


def stream_of(make, name: str, num_spans: int, first: int = 0, **options) -> TokenStream:
    dataset = make(name, num_spans * LONG + 6, first)  # six tokens of room for the grid to shift in
    return TokenStream(name, [dataset], seq_length=LONG, seed=3, **options)


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16])
def test_an_epoch_of_any_length_reads_every_token_once(counting_dataset, length):
    stream = stream_of(counting_dataset, "web", 200)
    n = 200 * LONG // length
    for epoch in range(2):
        starts = [stream.locate(k, length).token_offset for k in range(epoch * n, (epoch + 1) * n)]
        shift = min(starts)
        assert 0 <= shift <= 5
        assert sorted(starts) == list(range(shift, shift + 200 * LONG, length))
        assert {stream.locate(k, length).epoch for k in range(epoch * n, (epoch + 1) * n)} == {epoch}


def test_shorter_samples_are_contiguous(counting_dataset):
    stream = stream_of(counting_dataset, "web", 100)
    for k in range(0, 800, 7):
        start = stream.locate(k, 4).token_offset
        assert stream.read(k, 4).tolist() == list(range(start, start + 5))


def test_the_longest_length_is_the_default(counting_dataset):
    stream = stream_of(counting_dataset, "web", 100)
    assert [stream.locate(k, LONG) for k in range(300)] == [stream.locate(k) for k in range(300)]


def test_parts_of_a_span_do_not_follow_each_other(counting_dataset):
    """With windows of 64 spans of four parts, two parts of a span are neighbors as often as by chance."""
    stream = stream_of(counting_dataset, "web", 64 * 64)
    assert stream.grid.window_spans == 64
    spans = np.array([stream.locate(k, 4).span for k in range(64 * 64 * 4)])
    expected = len(spans) * 3 / 255
    assert abs((spans[1:] == spans[:-1]).sum() - expected) < 5 * expected**0.5
    for window in spans.reshape(64, 256):
        assert (np.unique(window, return_counts=True)[1] == 4).all()


def test_windows_and_lengths_have_orders_of_their_own(counting_dataset):
    stream = stream_of(counting_dataset, "web", 64 * 64)
    order = [tuple(np.argsort([stream.locate(256 * w + i, 4).token_offset for i in range(256)])) for w in range(6)]
    assert len(set(order)) == 6


@given(st.integers(1, 10**12))
def test_a_window_is_at_most_a_64th_of_an_epoch(num_spans):
    window = SpanGrid(LONG, num_spans).window_spans
    assert 1 <= window <= 1024
    assert window == 1 or window * 64 <= num_spans


@given(num_spans=st.integers(1, 5000), k=st.integers(0, 60_000), old=st.sampled_from([2, 4, 8, 16]),
       new=st.sampled_from([2, 4, 8, 16]))  # fmt: skip
def test_a_change_of_length_continues_with_the_next_unread_window(num_spans, k, old, new):
    grid = SpanGrid(LONG, num_spans)
    changed = grid.first_unread(k, old, new)
    if old == new:
        assert changed == k
        return
    read, start = k * old, changed * new  # in tokens
    assert read <= start < read + grid.window_spans * LONG
    place = start // LONG % num_spans
    assert start % LONG == 0
    assert place % grid.window_spans == 0


class Run:
    """Phases of random lengths over two sources, read with or without restarts."""

    def __init__(self, streams: list[TokenStream], phases: list[tuple[int, int, float]]) -> None:
        self.streams, self.phases, sample = streams, [], 0
        for n, (length, count, weight) in enumerate(phases):
            weights = {"web": weight, "code": 1 - weight} if weight < 1 else {"web": 1.0}
            self.phases.append(PhaseBlend(f"p{n}", sample, count, weights, length))
            sample += count

    def cursor(self, limits=None) -> BlendCursor:
        grids = {stream.name: stream.grid for stream in self.streams}
        return BlendCursor(self.phases, NAMES, limits=limits, grids=grids)

    def walk(self, cuts=(), limits=None) -> list[tuple[int, int, int]]:
        """Return (source, sample index, length) of every sample, with a restart from JSON at each cut."""
        found, state = [], self.cursor(limits).state_dict()
        total = self.phases[-1].end_sample
        ends = sorted({*cuts, *(phase.end_sample for phase in self.phases)} & set(range(1, total + 1)))
        for first, end in pairwise([0, *ends]):
            cursor = self.cursor(limits)
            cursor.load_state_dict(json.loads(json.dumps(state)))
            sources, ks = cursor.next(end - first)
            found += [(s, k, cursor.seq_length) for s, k in zip(sources.tolist(), ks.tolist(), strict=True)]
            state = cursor.state_dict()
        return found


PHASES = st.lists(
    st.tuples(st.sampled_from([2, 4, 8, 16]), st.integers(1, 400), st.sampled_from([0.5, 0.7, 1.0])),
    min_size=1,
    max_size=5,
)


@given(phases=PHASES, spans=st.tuples(st.integers(1, 700), st.integers(1, 300)), cuts=st.lists(st.integers(1, 2000)))
def test_nothing_is_read_twice_in_an_epoch_and_restarts_change_nothing(
    tmp_path_factory, write_pair, phases, spans, cuts
):
    folder = tmp_path_factory.mktemp("lengths")
    streams = [
        TokenStream(name, [write_pair(folder / name, [range(n * LONG + 6)], "<i4")], seq_length=LONG, seed=3)
        for name, n in zip(NAMES, spans, strict=True)
    ]
    run = Run(streams, phases)
    found = run.walk()
    assert run.walk(cuts) == found
    cursor, unbroken = run.cursor(), []
    for phase in run.phases:
        sources, ks = cursor.next(phase.num_samples)
        unbroken += [(s, k, phase.seq_length) for s, k in zip(sources.tolist(), ks.tolist(), strict=True)]
    assert unbroken == found
    for number, stream in enumerate(streams):
        seen: dict[int, set[int]] = {}
        # a source changes to the length of every phase that it is in, even if the phase reads no sample of it
        skipped, lengths = 0, [phase.seq_length for phase in run.phases if stream.name in phase.weights]
        num_changes = sum(a != b for a, b in pairwise(lengths))
        for source, k, length in found:
            if source == number:
                at = stream.locate(k, length)
                tokens = set(range(at.token_offset, at.token_offset + length))
                assert not tokens & seen.setdefault(at.epoch, set())
                seen[at.epoch] |= tokens
        if seen:
            skipped = max(seen) * spans[number] * LONG - sum(len(tokens) for e, tokens in seen.items() if e < max(seen))
        assert skipped <= num_changes * stream.grid.window_spans * LONG


@given(phases=PHASES, limits=st.fixed_dictionaries({"code": st.integers(0, 60)}), cuts=st.lists(st.integers(1, 2000)))
def test_a_source_ends_at_its_limit_whatever_the_length(tmp_path_factory, write_pair, phases, limits, cuts):
    folder = tmp_path_factory.mktemp("limits")
    streams = [
        TokenStream(name, [write_pair(folder / name, [range(300 * LONG + 6)], "<i4")], seq_length=LONG, seed=3)
        for name in NAMES
    ]
    run = Run(streams, phases)
    found = run.walk(limits=limits)
    assert run.walk(cuts, limits=limits) == found
    ends = [(k + 1) * length for source, k, length in found if source == NAMES.index("code")]
    assert max(ends, default=0) <= limits["code"] * LONG


def test_loader_reads_each_phase_in_its_length_with_its_batch(counting_dataset):
    streams = [stream_of(counting_dataset, "web", 300), stream_of(counting_dataset, "code", 200, 10_000)]
    run = Run(streams, [(4, 24, 0.5), (16, 8, 0.7), (4, 24, 1.0)])
    expected = [streams[s].read(k, length).tolist() for s, k, length in run.walk()]
    shapes = {0: (8, 2), 24: (4, 1), 32: (12, 3)}

    def size(which: int):
        return lambda samples: shapes[max(start for start in shapes if start <= samples)][which]

    ranks = []
    for rank in range(2):
        kwargs = {"data_parallel_rank": rank, "data_parallel_size": 2, "global_batch": size(0), "micro_batch": size(1)}
        with Loader(streams, run.cursor(), **kwargs) as loader:
            ranks.append(list(loader))
    read = []
    for first, second in zip(*ranks, strict=True):
        for pair in zip(first.micro_batches, second.micro_batches, strict=True):
            for batch in pair:
                read += np.concatenate([batch.tokens, batch.labels[:, -1:]], axis=1).tolist()
    assert read == expected
    assert [(step.num_tokens, len(step.micro_batches)) for step in ranks[0]] == [
        *[(32, 2)] * 3,
        *[(64, 2)] * 2,
        *[(48, 2)] * 2,
    ]


def test_the_order_does_not_depend_on_the_ramp(counting_dataset):
    streams = [stream_of(counting_dataset, "web", 300), stream_of(counting_dataset, "code", 200, 10_000)]
    run = Run(streams, [(LONG, 48, 0.5)])
    orders = []
    for global_batch in (8, lambda samples: 4 if samples < 16 else 8):
        with Loader(streams, run.cursor(), global_batch=global_batch, micro_batch=2) as loader:
            batches = [batch for step in loader for batch in step.micro_batches]
        orders.append(np.concatenate([batch.tokens for batch in batches]).tolist())
    assert orders[0] == orders[1]


def test_a_run_of_one_length_needs_no_lengths_of_samples(counting_dataset):
    streams = [stream_of(counting_dataset, "web", 300), stream_of(counting_dataset, "code", 200, 10_000)]
    run = Run(streams, [(LONG, 48, 0.5), (LONG, 20, 0.7)])
    plain = BlendCursor([PhaseBlend(p.name, p.first_sample, p.num_samples, p.weights) for p in run.phases], NAMES)
    ours = run.cursor()
    for count in (10, 40, 18):
        assert [a.tolist() for a in ours.next(count)] == [a.tolist() for a in plain.next(count)]
        assert ours.state_dict() == plain.state_dict() | {"chunk_lengths": {"web": LONG, "code": LONG}}


def test_a_source_that_leaves_and_comes_back_goes_on_where_it_was(counting_dataset):
    streams = [stream_of(counting_dataset, "web", 300), stream_of(counting_dataset, "code", 200, 10_000)]
    run = Run(streams, [(4, 40, 0.5)])
    cursor = run.cursor()
    cursor.next(20)
    grids = {stream.name: stream.grid for stream in streams}
    alone = BlendCursor([PhaseBlend("alone", 0, 30, {"web": 1.0}, 4)], ["web"], grids={"web": grids["web"]})
    alone.load_state_dict(cursor.state_dict())
    alone.next(10)
    back = BlendCursor([PhaseBlend("back", 0, 40, {"code": 1.0}, 4)], NAMES, grids=grids)
    back.load_state_dict(json.loads(json.dumps(alone.state_dict())))
    assert back.next(3)[1].tolist() == [10, 11, 12]


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_source_that_comes_back_in_other_spans_is_refused(counting_dataset, is_listed):
    """A source was read in spans of 16 tokens, left all blends (with or without its `sources` entry), and returns."""

    def phase(name: str, source: str) -> list[PhaseBlend]:
        return [PhaseBlend(name, 0, 90, {source: 1.0}, 4)]

    first = Run(
        [stream_of(counting_dataset, name, 300, at) for name, at in (("web", 0), ("code", 10_000))], [(4, 40, 0.5)]
    )
    both = {stream.name: stream.grid for stream in first.streams}
    short = SpanGrid(4, 1200)  # of a source that no phase reads: the run's own length
    cursor = first.cursor()
    cursor.next(20)
    names, grids = (NAMES, both | {"code": short}) if is_listed else (["web"], {"web": both["web"]})
    alone = BlendCursor(phase("alone", "web"), names, grids=grids)
    alone.load_state_dict(json.loads(json.dumps(cursor.state_dict())))
    alone.next(10)
    state = json.loads(json.dumps(alone.state_dict()))
    recut = BlendCursor(phase("back", "code"), NAMES, grids=both | {"code": short})
    with pytest.raises(RefusedError, match=r"cannot change once it was read: code 16 -> 4 tokens; keep"):
        recut.load_state_dict(state)
    back = BlendCursor(phase("back", "code"), NAMES, grids=both)
    back.load_state_dict(state)
    assert back.next(3)[1].tolist() == [10, 11, 12]


def test_fill_in_the_middle_differs_between_lengths(counting_dataset):
    fim = FillInMiddle(1.0, 0.5, prefix_id=90_001, middle_id=90_002, suffix_id=90_003, eod_id=90_000)
    stream = stream_of(counting_dataset, "web", 100, fim=fim)
    assert len(stream.read(3, 4)) == 5
    assert stream.read(3, 4).tolist() == stream.read(3, 4).tolist()
    assert stream.read(3, LONG).tolist() == stream.read(3).tolist()
