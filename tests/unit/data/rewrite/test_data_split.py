"""Splitting by content: copies stay together, order and growth make no difference, and the fraction is met."""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress

import numpy as np
import pytest

from megatron_cpt.data.rewrite.split import split_datasets
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import UserError
from tests.helpers.faults import FailingDisk

RNG = np.random.default_rng(7)
CORPUS = [tuple(RNG.integers(0, 1000, RNG.integers(1, 30)).tolist()) for _ in range(2000)]


def read_all(prefix) -> list[tuple[int, ...]]:
    dataset = IndexedDataset(prefix)
    return [tuple(dataset.document(number).tolist()) for number in range(dataset.num_documents)]


def split(prefixes, folder, **options) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    folder.mkdir(exist_ok=True)
    outputs = str(folder / "held"), str(folder / "rest")
    report = split_datasets([str(one) for one in prefixes], *outputs, **{"fraction": 0.1} | options)
    held, rest = map(read_all, outputs)
    assert (report.held_out_documents, report.rest_documents) == (len(held), len(rest))
    assert (report.held_out_tokens, report.rest_tokens) == (sum(map(len, held)), sum(map(len, rest)))
    return held, rest


def test_every_document_goes_to_one_side_in_order(make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cpt.data.tokenfile.documents.BLOCK_DOCUMENTS", 17)
    dataset = make_dataset("web", CORPUS)
    done: list[int] = []
    held, rest = split([dataset.prefix], tmp_path / "out", progress=done.append)
    assert sum(done) == 2 * dataset.num_tokens
    held_set = set(held)
    assert held == [one for one in CORPUS if one in held_set]
    assert rest == [one for one in CORPUS if one not in held_set]
    assert not held_set & set(rest)
    assert abs(len(held) - 200) < 4 * np.sqrt(200)


def test_a_side_depends_on_the_content_alone(make_dataset, tmp_path):
    web = make_dataset("web", CORPUS)
    held = set(split([web.prefix], tmp_path / "one")[0])
    shuffled = [CORPUS[i] for i in RNG.permutation(len(CORPUS))]
    # in another order, another type, over two files, with new documents and copies of old ones
    first = make_dataset("first", [*shuffled[:700], (5, 6, 7)], "<i4")
    second = make_dataset("second", [*shuffled[700:], *CORPUS[:50]], "<i4")
    grown, _ = split([first.prefix, second.prefix], tmp_path / "two")
    assert {one for one in grown if one != (5, 6, 7)} == held


def test_seed_and_fraction(make_dataset, tmp_path):
    web = make_dataset("web", CORPUS)
    small = set(split([web.prefix], tmp_path / "a", fraction=0.05)[0])
    large = set(split([web.prefix], tmp_path / "b", fraction=0.2)[0])
    other = set(split([web.prefix], tmp_path / "c", fraction=0.05, seed=1)[0])
    assert small < large
    assert other != small
    assert split([web.prefix], tmp_path / "d", fraction=0.05)[0] == [one for one in CORPUS if one in small]


def test_a_sample(make_dataset, tmp_path):
    web = make_dataset("web", CORPUS)
    report = split_datasets([web.prefix], str(tmp_path / "sample"), None, fraction=0.1)
    assert read_all(tmp_path / "sample") == split([web.prefix], tmp_path / "out")[0]
    assert report.held_out_documents + report.rest_documents == len(CORPUS)


def test_a_document_longer_than_a_block(make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cpt.data.tokenfile.documents.document_blocks.__defaults__", (8,))
    documents = [tuple(range(50)), (1, 2), (), tuple(range(7)), (3,) * 8, (4,)]
    web = make_dataset("web", documents)
    held, rest = split([web.prefix], tmp_path / "out", fraction=0.5)
    assert sorted(held + rest) == sorted(documents)
    assert held
    assert rest


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_no_share(make_dataset, tmp_path, fraction):
    web = make_dataset("web", CORPUS[:3])
    with pytest.raises(UserError, match="give a share of the documents above 0 and below 1"):
        split_datasets([web.prefix], str(tmp_path / "x"), None, fraction=fraction)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_that_is_too_large(make_dataset, tmp_path, seed):
    web = make_dataset("web", CORPUS[:3])
    with pytest.raises(UserError, match=f"seed: {seed}: give a signed integer of 64 bits"):
        split_datasets([web.prefix], str(tmp_path / "x"), None, fraction=0.5, seed=seed)
    assert not list(tmp_path.glob("x*"))
    split_datasets([web.prefix], str(tmp_path / "x"), None, fraction=0.5, seed=seed - 1 if seed > 0 else seed + 1)


def test_outputs_that_cannot_be(make_dataset, tmp_path):
    web, other = make_dataset("web", CORPUS[:3]), make_dataset("other", [[1]], "<i4")
    x, y = str(tmp_path / "x"), str(tmp_path / "y")
    with pytest.raises(UserError, match="is given for both outputs"):
        split_datasets([web.prefix], x, x, fraction=0.5)
    with pytest.raises(UserError, match="is an input too"):
        split_datasets([web.prefix], x, web.prefix, fraction=0.5)
    with pytest.raises(UserError, match=r"other: has int32 tokens"):
        split_datasets([web.prefix, other.prefix], x, y, fraction=0.5)
    make_dataset("y", [[1]])
    with pytest.raises(UserError, match="exists already"):
        split_datasets([web.prefix], x, y, fraction=0.5)
    assert not list(tmp_path.glob("x*"))


def test_a_failing_disk_leaves_neither_side_so_the_next_call_succeeds(make_dataset, tmp_path):
    """Before, one side stayed, and the next call was refused because it existed."""
    web, folder = make_dataset("web", CORPUS[:50]), tmp_path / "out"
    expected = split([web.prefix], folder)
    complete = {path.name for path in folder.iterdir()}
    shutil.rmtree(folder)
    disk = FailingDisk(folder)
    with disk.fails_at(None):
        split([web.prefix], folder)
    num_failed = 0
    for at in range(disk.changes):
        shutil.rmtree(folder)
        folder.mkdir()
        with suppress(OSError), disk.fails_at(at, errno.ENOSPC):
            split([web.prefix], folder)
        if {path.name for path in folder.iterdir()} != complete:  # else the fault came after both had their names
            assert list(folder.iterdir()) == []
            assert split([web.prefix], folder) == expected
            num_failed += 1
    assert num_failed > 10
