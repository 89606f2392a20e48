"""Cache on a local disk: correct tokens and a single fetch, even if the cache is damaged."""

from __future__ import annotations

import os

import numpy as np
import pytest

from megatron_cpt.data.loading.loader import Loader
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.data.tokenfile import disk_cache as module
from megatron_cpt.data.tokenfile.disk_cache import BLOCK_BYTES, CachedFile, keep_on_disk
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.remote import open_ranges
from megatron_cpt.sampling.blend import BlendCursor, PhaseBlend

NUM_TOKENS = 100_003  # 25 blocks, the last one not full


class Counted:
    """Replacement of `open_ranges` that counts the bytes read."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, int]] = []

    def __call__(self, path):
        file, requests = open_ranges(path), self.requests
        read_into = file.read_into

        def counted(buffer, offset):
            requests.append((offset, len(buffer)))
            return read_into(buffer, offset)

        file.read_into = counted
        return file


@pytest.fixture(autouse=True)
def _space(monkeypatch) -> None:
    """Test on any disk, however full."""
    monkeypatch.setattr(module, "_LEAST_FREE", 0.0)


@pytest.fixture
def origin(monkeypatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(module, "open_ranges", counted)
    return counted


@pytest.fixture
def prefix(tmp_path) -> str:
    with IndexedDatasetWriter(tmp_path / "source", "<i4") as writer:
        writer.add_document(np.arange(NUM_TOKENS) * 7 % 1009)
    return str(tmp_path / "source")


def cached(prefix, folder) -> IndexedDataset:
    dataset = IndexedDataset(prefix)
    keep_on_disk([dataset], str(folder))
    return dataset


def test_any_range_is_the_same_and_is_fetched_once(prefix, tmp_path, origin):
    plain, rng = IndexedDataset(prefix), np.random.default_rng(1)
    ranges = [(int(start), int(rng.integers(0, 9000))) for start in rng.integers(0, NUM_TOKENS - 9000, 60)]
    ranges += [(0, NUM_TOKENS), (NUM_TOKENS - 1, 1), (5, 0)]
    first = cached(prefix, tmp_path / "cache")
    for start, count in ranges:
        assert np.array_equal(first.read(start, count), plain.read(start, count))
    assert sum(count for _, count in origin.requests) == NUM_TOKENS * 4
    again = cached(prefix, tmp_path / "cache")  # as another process of the node, or after a restart
    assert np.array_equal(again.read(0, NUM_TOKENS), plain.read(0, NUM_TOKENS))
    assert sum(count for _, count in origin.requests) == NUM_TOKENS * 4
    with pytest.raises(IndexError):
        again.read(NUM_TOKENS, 1)


def test_what_is_announced_is_fetched_ahead_with_one_request_a_sample(prefix, tmp_path, origin):
    dataset = cached(prefix, tmp_path / "cache")
    places = [i * 3 * BLOCK_BYTES // 4 for i in range(8)]
    for start in places:
        dataset.will_read([start, start], [4097, 4097])
    for start in places:
        assert np.array_equal(dataset.read(start, 4097), IndexedDataset(prefix).read(start, 4097))
    assert sorted(origin.requests) == [(start * 4, 2 * BLOCK_BYTES) for start in places]


def test_a_damaged_block_is_fetched_again(prefix, tmp_path, origin):
    cached(prefix, tmp_path / "cache").read(0, NUM_TOKENS)
    (blocks,) = (tmp_path / "cache").glob("*.blocks")
    with blocks.open("r+b") as file:  # as after a power cut: the table reached the disk and the block did not
        file.seek(3 * BLOCK_BYTES)
        file.write(bytes(BLOCK_BYTES))
    origin.requests.clear()
    assert np.array_equal(
        cached(prefix, tmp_path / "cache").read(0, NUM_TOKENS), IndexedDataset(prefix).read(0, NUM_TOKENS)
    )
    assert origin.requests == [(3 * BLOCK_BYTES, BLOCK_BYTES)]


def test_another_content_under_the_same_name_is_not_mixed_up(prefix, tmp_path):
    cached(prefix, tmp_path / "cache").read(0, NUM_TOKENS)
    with IndexedDatasetWriter(prefix, "<i4") as writer:
        writer.add_document(np.arange(NUM_TOKENS) * 11 % 1013)
    assert cached(prefix, tmp_path / "cache").read(1, 3).tolist() == [11, 22, 33]


def test_a_full_disk_is_left_alone_with_a_warning(prefix, tmp_path, origin, monkeypatch, caplog):
    monkeypatch.setattr(module, "_LEAST_FREE", 1.1)
    dataset = cached(prefix, tmp_path / "cache")
    for _ in range(2):
        assert np.array_equal(dataset.read(10, 5000), IndexedDataset(prefix).read(10, 5000))
    assert len(origin.requests) == 2
    assert not list((tmp_path / "cache").glob("*.blocks"))
    assert [record.message.split(":")[0] for record in caplog.records] == [str(tmp_path / "cache")]


def test_a_file_that_was_cut_is_refused(prefix, tmp_path):
    dataset = cached(prefix, tmp_path / "cache")
    dataset.read(0, 100)
    os.truncate(f"{prefix}.bin", 6 * BLOCK_BYTES)
    assert dataset.read(0, 100).size == 100  # from the cache, so of the file that was opened
    with pytest.raises(RefusedError, match=r"source\.bin.* truncated from 400012 to 98304 bytes"):
        dataset.read(5 * BLOCK_BYTES // 4, 3 * BLOCK_BYTES // 4)


def test_a_folder_that_cannot_be_written(prefix, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        keep_on_disk([IndexedDataset(prefix)], str(tmp_path / "file"))


def test_reads_as_any_file(prefix, tmp_path):
    with open_ranges(f"{prefix}.bin") as plain, CachedFile(IndexedDataset(prefix), str(tmp_path)) as file:
        assert file.size == plain.size
        for offset, count in ((0, 10), (plain.size - 5, 50), (plain.size, 5), (BLOCK_BYTES - 1, 2)):
            assert file.read(offset, count) == plain.read(offset, count)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_loader_gives_the_same_samples_through_it(prefix, tmp_path, ranks):
    """Ranks of one node that share a cache read the tokens that a single rank reads without a cache."""

    def samples(dataset, rank, size):
        stream = TokenStream("s", [dataset], seq_length=512, seed=3)
        cursor = BlendCursor([PhaseBlend("only", 0, 256, {"s": 1.0})], ["s"])
        with Loader(
            [stream], cursor, global_batch=16, micro_batch=4, data_parallel_rank=rank, data_parallel_size=size
        ) as loader:
            return np.stack([np.concatenate([batch.tokens for batch in step.micro_batches]) for step in loader])

    alone = samples(IndexedDataset(prefix), 0, 1).reshape(-1, 4 // ranks, ranks, 4, 512)
    for rank in range(ranks):
        mine = samples(cached(prefix, tmp_path / "cache"), rank, ranks)
        assert np.array_equal(mine, alone[:, :, rank].reshape(mine.shape))
