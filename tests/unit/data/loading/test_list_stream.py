"""Stream over a document list: the samples of a pair into which the listed documents were copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data.loading.samples import read_document_ends, read_samples
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.data.tokenfile import listed_documents
from megatron_cpt.data.tokenfile.fingerprint import fingerprint, is_same_data
from megatron_cpt.data.tokenfile.listed_documents import ListedDocuments, open_dataset
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter, expand_prefixes
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.identity import ChangedFileError
from tests.helpers.document_lists import write_list

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


def write_pair(prefix: Path, documents, dtype=np.uint16) -> IndexedDataset:
    with IndexedDatasetWriter(str(prefix), dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(str(prefix))


def counting_pairs(folder: Path, corpora) -> list[IndexedDataset]:
    """Write pairs with documents of these lengths; no token occurs twice."""
    pairs, next_token = [], 0
    for number, lengths in enumerate(corpora):
        documents = []
        for length in lengths:
            documents.append(np.arange(next_token, next_token + length))
            next_token += length
        pairs.append(write_pair(folder / f"pair{number}", documents))
    return pairs


@given(data=st.data(), corpora=st.lists(LENGTHS, min_size=1, max_size=3), seq_length=st.sampled_from([1, 2, 4, 8]))
def test_equal_to_a_copy_of_the_documents(tmp_path_factory, data, corpora, seq_length):
    folder = tmp_path_factory.mktemp("listed")
    pairs = counting_pairs(folder, corpora)
    every = [(one, document) for one, pair in enumerate(pairs) for document in range(pair.num_documents)]
    chosen = [place for place in every if data.draw(st.booleans())]
    path = write_list(folder / "mined.docs", pairs, chosen)
    copy = write_pair(folder / "copy", [pairs[one].document(document) for one, document in chosen])
    listed = open_dataset(path)
    assert (listed.num_documents, listed.num_tokens) == (copy.num_documents, copy.num_tokens)
    assert listed.sizes.tolist() == copy.sizes[:].tolist()
    for number in range(copy.num_documents):
        assert listed.document(number).tolist() == copy.document(number).tolist()
    if copy.num_tokens <= seq_length:
        with pytest.raises(UserError, match="too few"):
            TokenStream.open("mined", str(path), seq_length=seq_length, seed=5)
        return
    streams = [TokenStream.open("mined", str(name), seq_length=seq_length, seed=5) for name in (path, copy.prefix)]
    assert streams[0].samples_per_epoch == streams[1].samples_per_epoch
    indices = np.arange(2 * streams[0].samples_per_epoch)
    sources = np.zeros_like(indices)
    for length in (None, 1):
        first, second = (read_samples([stream], sources, indices, seq_length=length) for stream in streams)
        assert first.dtype == second.dtype
        assert np.array_equal(first, second)
        ends = [read_document_ends([stream], sources, indices, length) for stream in streams]
        assert np.array_equal(*ends)


def test_every_way_to_name_a_list(tmp_path):
    pairs = counting_pairs(tmp_path, [[5, 7], [9]])
    first = str(write_list(tmp_path / "a.docs", pairs, [(0, 1), (1, 0)], relative=True))
    second = str(write_list(tmp_path / "b.docs", pairs, [(0, 0)]))
    assert expand_prefixes(str(tmp_path / "*.docs")) == [first, second]
    assert expand_prefixes([first, pairs[0].prefix]) == [first, pairs[0].prefix]
    with pytest.raises(UserError, match=r"no file matches .*c\*\.docs$"):
        expand_prefixes(str(tmp_path / "c*.docs"))
    mixed = TokenStream.open("mixed", [second, pairs[1].prefix], seq_length=2, seed=1)
    assert mixed.num_tokens == 5 + 9
    assert {mixed.locate(index).prefix for index in range(mixed.samples_per_epoch)} == {second, pairs[1].prefix}
    with pytest.raises(UserError, match=r"a\.docs and \S*pair0 name 1 documents more than once"):
        TokenStream.open("mixed", [first, pairs[0].prefix], seq_length=2, seed=1)


def test_a_moved_folder_keeps_the_fingerprint(tmp_path):
    (tmp_path / "old").mkdir()
    pairs = counting_pairs(tmp_path / "old", [[5, 7]])
    write_list(tmp_path / "old" / "a.docs", pairs, [(0, 1)], relative=True)
    before = fingerprint([open_dataset(tmp_path / "old" / "a.docs")])
    (tmp_path / "old").rename(tmp_path / "new")
    moved = open_dataset(tmp_path / "new" / "a.docs")
    assert moved.document(0).tolist() == list(range(5, 12))
    assert fingerprint([moved]) == before
    write_list(tmp_path / "new" / "b.docs", moved.parts, [(0, 0)])
    assert not is_same_data(before, fingerprint([open_dataset(tmp_path / "new" / "b.docs")]))
    assert not is_same_data(before, fingerprint(moved.parts))


def test_bounds_are_read_a_block_of_the_index_at_a_time(tmp_path, monkeypatch):
    (pair,) = counting_pairs(tmp_path, [[3] * 50])
    chosen = [(0, number) for number in (0, 1, 7, 8, 9, 31, 48, 49)]
    path = write_list(tmp_path / "a.docs", [pair], chosen)
    monkeypatch.setattr(listed_documents, "_INDEX_BLOCK", 8)
    listed = open_dataset(path)
    assert [int(listed.document(number)[0]) for number in range(8)] == [3 * document for _, document in chosen]


def test_ids_outside_are_named_with_the_file_of_the_document(tmp_path):
    pair = counting_pairs(tmp_path, [[4, 4, 4]])[0]
    path = write_list(tmp_path / "a.docs", [pair], [(0, 0), (0, 2)])
    stream = TokenStream.open("mined", str(path), seq_length=7, seed=1)
    with pytest.raises(RefusedError, match=rf"source mined: {pair.prefix}\.bin: document 2, token 9 of the file"):
        read_samples([stream], np.array([0]), np.array([0]), vocab_size=9)


def test_a_pair_that_changed_since_is_refused(tmp_path):
    pair = counting_pairs(tmp_path, [[40, 40]])[0]
    path = write_list(tmp_path / "a.docs", [pair], [(0, 1)])
    listed = open_dataset(path)
    write_pair(tmp_path / "pair0", [range(100, 140), range(200, 240)])
    with pytest.raises(RefusedError, match=r"pair0: is not the dataset that .*a\.docs was made of.*mine again"):
        ListedDocuments(path)
    with pytest.raises(ChangedFileError):
        listed.read(0, 4)
    with pytest.raises(ChangedFileError):
        listed.check_unchanged()


def test_pairs_of_different_token_types_are_refused(tmp_path):
    pairs = [write_pair(tmp_path / "a", [[1, 2]]), write_pair(tmp_path / "b", [[1, 2]], np.int32)]
    path = write_list(tmp_path / "a.docs", pairs, [(0, 0)])
    with pytest.raises(UserError, match=r"b has int32 tokens, .*a has uint16"):
        open_dataset(path)


def test_a_list_where_only_a_pair_can_be(tmp_path):
    path = write_list(tmp_path / "a.docs", counting_pairs(tmp_path, [[5]]), [(0, 0)])
    with pytest.raises(UserError, match="a document list cannot be used here"):
        IndexedDataset(path)
    with pytest.raises(UserError, match=r"no\.docs: no such file"):
        open_dataset(tmp_path / "no.docs")
