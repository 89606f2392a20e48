"""Stream of a source: every span once per epoch, exact reads, a pure function of (seed, name, sample index)."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter
from megatron_cpt.errors import RefusedError, UserError

S = 16


@pytest.fixture
def stream(counting_dataset) -> TokenStream:
    """Files of 6, 0 and 12 spans; no token value occurs twice."""
    files = [counting_dataset("a", 100), counting_dataset("b", 16, 1000), counting_dataset("c", 200, 2000)]
    return TokenStream("web", files, seq_length=S, seed=1)


def test_sizes(stream):
    assert stream.samples_per_epoch == 6 + 0 + 12
    assert stream.num_tokens == 316


def test_a_sample_is_contiguous_in_its_file(stream):
    for k in range(3 * stream.samples_per_epoch):
        location, tokens = stream.locate(k), stream.read(k)
        whole = IndexedDataset(location.prefix).read(0, IndexedDataset(location.prefix).num_tokens)
        assert tokens.tolist() == whole[location.token_offset : location.token_offset + S + 1].tolist()
        assert len(tokens) == S + 1


@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=6),
    seq_length=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_every_span_exactly_once_per_epoch(tmp_path_factory, write_pair, lengths, seq_length, seed, epoch):
    folder = tmp_path_factory.mktemp("stream")
    files = [write_pair(folder / str(i), [range(length)]) for i, length in enumerate(lengths)]
    spans = [max(0, length - 1) // seq_length for length in lengths]
    if sum(spans) == 0:
        with pytest.raises(UserError, match="too few for one sample"):
            TokenStream("web", files, seq_length=seq_length, seed=seed)
        return
    stream = TokenStream("web", files, seq_length=seq_length, seed=seed)
    assert stream.samples_per_epoch == sum(spans)
    starts: dict[str, list[int]] = {file.prefix: [] for file in files}
    for k in range(epoch * sum(spans), (epoch + 1) * sum(spans)):
        location = stream.locate(k)
        assert location.epoch == epoch
        starts[location.prefix].append(location.token_offset)
    for file, length, num_spans in zip(files, lengths, spans, strict=True):
        offsets = np.sort(starts[file.prefix])
        assert len(offsets) == num_spans
        assert (np.diff(offsets) == seq_length).all()  # a grid without gaps or overlaps
        if num_spans:
            assert offsets[0] >= 0
            assert offsets[-1] + seq_length + 1 <= length  # the last label is still in the file


def test_epochs_differ_in_order_and_grid(counting_dataset):
    stream = TokenStream("web", [counting_dataset("a", 64 * S)], seq_length=S, seed=1)  # the most slack there can be
    n = stream.samples_per_epoch
    epochs = [[stream.locate(k).token_offset for k in range(e * n, (e + 1) * n)] for e in range(40)]
    assert len({min(epoch) for epoch in epochs}) >= 12  # of 16 possible shifts, 40 draws meet 14.8 on average
    orders = [tuple(np.argsort(epoch)) for epoch in epochs]
    assert len(set(orders)) == len(orders)
    assert sorted(epochs[0]) != epochs[0]


def test_a_sample_depends_on_seed_name_and_k_only(counting_dataset, stream, tmp_path):
    again = TokenStream("web", stream.datasets, seq_length=S, seed=1)
    backwards = {k: again.read(k).tolist() for k in reversed(range(40))}
    assert [backwards[k] for k in range(40)] == [stream.read(k).tolist() for k in range(40)]
    (tmp_path / "moved").mkdir()
    for name in "abc":
        for ending in ("bin", "idx"):
            os.rename(tmp_path / f"{name}.{ending}", tmp_path / "moved" / f"{name}.{ending}")
    moved = [IndexedDataset(tmp_path / "moved" / name) for name in "abc"]
    elsewhere = TokenStream("web", moved, seq_length=S, seed=1)
    assert [elsewhere.read(k).tolist() for k in range(40)] == [backwards[k] for k in range(40)]


@pytest.mark.parametrize(("name", "seed"), [("web", 2), ("code", 1)])
def test_another_seed_or_name_is_another_order(stream, name, seed):
    other = TokenStream(name, stream.datasets, seq_length=S, seed=seed)
    assert [other.locate(k).span for k in range(18)] != [stream.locate(k).span for k in range(18)]


def test_far_into_a_run(stream):
    location = stream.locate(10**15)
    assert location.epoch == 10**15 // 18
    assert len(stream.read(10**15)) == S + 1


def test_negative_sample(stream):
    with pytest.raises(IndexError, match="web: sample -1"):
        stream.read(-1)


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_token_type_must_be_an_integer(tmp_path, dtype):
    with IndexedDatasetWriter(tmp_path / "p", dtype) as writer:
        writer.add_documents(np.zeros(100), [100])
    with pytest.raises(RefusedError, match=r"p\.idx: source web: the token type is float"):
        TokenStream("web", [IndexedDataset(tmp_path / "p")], seq_length=S, seed=1)


def test_opening_reads_headers_only(counting_dataset, tmp_path):
    dataset = counting_dataset("a", 100)
    os.unlink(tmp_path / "a.bin")
    os.unlink(tmp_path / "a.idx")
    stream = TokenStream("web", [dataset], seq_length=S, seed=1)
    assert stream.locate(7).epoch == 1


def test_open_and_index(counting_dataset, stream, tmp_path):
    web = TokenStream.open("web", [str(tmp_path / "[a-c]")], seq_length=S, seed=1)
    assert [web[k].tolist() for k in range(40)] == [stream.read(k).tolist() for k in range(40)]
    one = TokenStream.open("web", str(tmp_path / "a"), seq_length=S, seed=1)
    assert one.samples_per_epoch == 6
    with pytest.raises(UserError, match=r"no such file: .*none\.idx"):
        TokenStream.open("web", str(tmp_path / "none"), seq_length=S, seed=1)
