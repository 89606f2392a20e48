"""Contamination: hashes compared with plain n-grams, verdicts by hand, random data compared with brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data.contamination.held_out import held_out_documents
from megatron_cpt.data.contamination.ngrams import HashSet, ngram_hashes, ngrams_inside
from megatron_cpt.data.contamination.overlap import HeldOutSet, find_overlap
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.errors import RefusedError, UserError


def grams(tokens, n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def held_out_set(documents, n: int, eod_id: int | None = None) -> HeldOutSet:
    named = [(f"h{number}", np.array(ids, np.int64)) for number, ids in enumerate(documents)]
    return HeldOutSet(named, ngram=n, eod_id=eod_id)


class TestNgrams:
    @given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 17))
    def test_equal_exactly_where_the_ids_are(self, ids, n):
        hashes = ngram_hashes(np.array(ids, np.uint16), n).tolist()
        plain = grams(ids, n)
        assert len(hashes) == len(plain)
        assert len(set(zip(hashes, plain, strict=True))) == len(set(hashes)) == len(set(plain))

    def test_type_and_block_size_make_no_difference(self, monkeypatch):
        ids = np.random.default_rng(0).integers(0, 60_000, 1000)
        whole = ngram_hashes(ids, 13)
        monkeypatch.setattr("megatron_cpt.data.contamination.ngrams._BLOCK_HASHES", 7)
        for dtype in ("<u2", "<i4", "<i8"):
            assert (ngram_hashes(ids.astype(dtype), 13) == whole).all()

    @given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(1, 5))
    def test_windows(self, lengths, n):
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        owner = np.repeat(np.arange(len(lengths)), lengths)
        expected = [owner[i] == owner[i + n - 1] for i in range(len(owner) - n + 1)]
        assert ngrams_inside(bounds, n).tolist() == expected

    def test_hash_set(self):
        rng = np.random.default_rng(1)
        members = rng.integers(0, 2**63, 5000).astype(np.uint64) * np.uint64(2)
        strangers = members[:1000] + np.uint64(1)
        known = HashSet(np.concatenate([members, members]))
        places, found = known.find(np.concatenate([strangers, members]))
        assert len(known) == len(set(members.tolist()))
        assert places.tolist() == list(range(1000, 6000))
        assert (known.values[found] == members).all()
        assert HashSet(np.empty(0, np.uint64)).find(members)[0].size == 0


def test_verdicts_by_hand(make_dataset):
    training = [
        [*range(100, 150), 9],  # 0: contains all of h0 in the middle, and is no copy
        [1, 2, 3, 9],  # 1: a copy of h1 but for the end
        [50, 51, 52, 53, 60, 61, 62, 63, 64, 9],  # 2: half of h2
        [54, 55, 56, 57, 9],  # 3: another part of h2
        [7, 7, 9],  # 4: a copy of h4, too short for an n-gram
        [*range(200, 230), 9],  # 5: a copy of h5
        [*range(200, 230), 9],  # 6: again
    ]
    held_out = [
        [*range(110, 130)],  # h0
        [1, 2, 3],  # h1
        [*range(50, 58)],  # h2: 5 n-grams of 4
        [*range(300, 320)],  # h3
        [7, 7],  # h4
        [*range(200, 230), 9],  # h5
        [8, 8],  # h6: too short, and no copy
        [150, 9, 1, 2],  # h7: not inside a single document
    ]
    dataset = make_dataset("web", training)
    report = find_overlap([dataset], held_out_set(held_out, 4, eod_id=9))
    verdicts = {one.name: one.verdict(report.near) for one in report.held_out}
    assert verdicts == {
        "h0": "near", "h1": "exact", "h2": "partial", "h3": "clean",
        "h4": "exact", "h5": "exact", "h6": "short", "h7": "clean",
    }  # fmt: skip
    assert report.counts() == {"exact": 3, "near": 1, "partial": 1, "clean": 2, "short": 1}
    h0, _, h2, *_ = report.held_out
    assert (h0.ngrams, h0.found, h0.best_shared, h0.best_document) == (17, 17, 17, 0)
    assert (h2.ngrams, h2.found, h2.best_shared, h2.best_document) == (5, 2, 1, 2)
    assert (report.held_out[5].copies, report.held_out[5].best_document) == (2, 5)
    assert (report.training_documents, report.training_hits) == (7, 7)
    assert [(hit.document, hit.shared) for hit in report.worst][:3] == [(5, 27), (6, 27), (0, 17)]
    half = find_overlap([dataset], held_out_set(held_out, 4, eod_id=9), near=0.2)
    assert half.held_out[2].verdict(half.near) == "near"


@given(
    training=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=12),
    held_out=st.lists(st.lists(st.integers(0, 2), max_size=10), min_size=1, max_size=6),
    n=st.integers(1, 5),
    block=st.integers(1, 40),
)
def test_against_a_plain_search(tmp_path_factory, write_pair, training, held_out, n, block):
    folder = tmp_path_factory.mktemp("overlap")
    halves = [write_pair(folder / "a", training[::2]), write_pair(folder / "b", training[1::2])]
    flags: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_cpt.data.tokenfile.documents.document_blocks.__defaults__", (block,))
        report = find_overlap(halves, held_out_set(held_out, n), on_block=lambda d, b, hit: flags.extend(hit.tolist()))
    in_order = [*training[::2], *training[1::2]]
    everything = {gram for document in in_order for gram in grams(document, n)}
    for document, ids in zip(report.held_out, held_out, strict=True):
        own = set(grams(ids, n))
        assert document.ngrams == len(own)
        assert document.found == len(own & everything)
        assert document.copies == (in_order.count(ids) if ids else 0)
        assert document.best_shared == max(len(own & set(grams(other, n))) for other in in_order)
    all_held_out = {gram for ids in held_out for gram in grams(ids, n)}
    hits = [bool(set(grams(one, n)) & all_held_out) or (bool(one) and one in held_out) for one in in_order]
    assert flags == hits
    assert report.training_hits == sum(hits)


def test_held_out_sets(make_dataset, tmp_path):
    make_dataset("val_a", [[1, 2], [3]])
    make_dataset("val_b", [[4]])
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"q": "ab", "a": "c"}\n\n{"q": "d", "n": 1}\n')
    inputs = [str(tmp_path / "val_*"), str(exam)]
    found = [(name, ids.tolist()) for name, ids in held_out_documents(inputs, load_tokenizer("byte"), ["q", "a"])]
    assert found == [
        (f"{tmp_path}/val_a[0]", [1, 2]),
        (f"{tmp_path}/val_a[1]", [3]),
        (f"{tmp_path}/val_b[0]", [4]),
        (f"{exam}:1:q", [97, 98]),
        (f"{exam}:1:a", [99]),
        (f"{exam}:3:q", [100]),
    ]


def test_held_out_sets_that_cannot_be(tmp_path):
    exam = tmp_path / "exam.jsonl"
    with pytest.raises(UserError, match="no such file"):
        list(held_out_documents([str(exam)], load_tokenizer("byte")))
    exam.write_text('{"q": "x"}\n')
    with pytest.raises(UserError, match="needs the tokenizer of the training data"):
        list(held_out_documents([str(exam)], None))
    with pytest.raises(UserError, match="no line has text under text"):
        list(held_out_documents([str(exam)], load_tokenizer("byte")))
    exam.write_text('{"text": "x"}\n{"text"\n')
    with pytest.raises(RefusedError, match="line 2: not JSON"):
        list(held_out_documents([str(exam)], load_tokenizer("byte")))
    with pytest.raises(UserError, match="has no documents"):
        held_out_set([], 13)
