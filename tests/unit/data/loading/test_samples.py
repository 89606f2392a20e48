"""Samples of several streams read together equal the samples that each stream reads alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data import IndexedDataset, TokenStream
from megatron_cpt.data.loading.fim import FillInMiddle
from megatron_cpt.data.loading.samples import read_samples
from megatron_cpt.errors import RefusedError
from megatron_cpt.files import remote as storage_module

S = 8
FIM = FillInMiddle(1.0, 0.5, 70_001, 70_002, 70_003, eod_id=0)  # ids that need more than the files' 16 bits


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory, write_pair) -> list[TokenStream]:
    """Streams: 16 bits in three files, 32 bits, and 16 bits with fill-in-the-middle."""
    folder = tmp_path_factory.mktemp("samples")
    short = [write_pair(folder / f"short-{n}", [range(100 * n + 1, 100 * n + 60)], "<u2") for n in range(3)]
    wide = [write_pair(folder / "wide", [range(100_000, 100_200)], "<i4")]
    files = {"short": short, "wide": wide, "code": short[:1]}
    return [
        TokenStream(name, datasets, seq_length=S, seed=3, fim=FIM if name == "code" else None)
        for name, datasets in files.items()
    ]


WANTED = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 200)), min_size=1, max_size=40)


@given(wanted=WANTED, length=st.sampled_from([None, S, S // 2]))
def test_equal_to_what_each_stream_reads_alone(streams, wanted, length):
    sources, ks = np.array(wanted).T
    samples = read_samples(streams, sources, ks, vocab_size=200_000, seq_length=length)
    assert samples.tolist() == [streams[source].read(k, length).tolist() for source, k in wanted]


def test_without_wider_ones_they_stay_in_the_type_of_the_files(streams):
    ks = np.arange(30)
    assert read_samples(streams[:1], np.zeros_like(ks), ks).dtype == np.uint16
    assert streams[2].dtype.itemsize == 4


def test_each_file_is_opened_once_to_announce_and_once_to_read(streams, monkeypatch):
    opened: Counter[str] = Counter()
    original = storage_module.open_ranges

    def counted(path: str):
        opened[path] += 1
        return original(path)

    monkeypatch.setattr("megatron_cpt.data.tokenfile.reader.open_ranges", counted)
    ks = np.tile(np.arange(20), 2)
    read_samples(streams, np.repeat([0, 1], 20), ks)
    assert len(opened) == 4
    assert set(opened.values()) == {2}


def test_a_file_that_was_cut_is_named(tmp_path, write_pair):
    dataset: IndexedDataset = write_pair(tmp_path / "web", [range(100)], "<u2")
    stream = TokenStream("web", [dataset], seq_length=S, seed=3)
    with open(f"{dataset.prefix}.bin", "r+b") as file:
        file.truncate(50)
    with pytest.raises(RefusedError, match=r"web\.bin.*truncated from 200 to 50 bytes"):
        read_samples([stream], np.zeros(12, np.int64), np.arange(12))
