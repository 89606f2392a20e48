"""Document lists: what is written is read again; damage, other datasets and disorder are refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from megatron_cpt.data.tokenfile.document_list import (
    DocumentList,
    describe_dataset,
    is_document_list,
    open_listed_datasets,
    read_document_list,
    write_document_list,
)
from megatron_cpt.errors import RefusedError, UserError

CORPUS = [[1, 2, 3], [4], [], [5, 6], [7, 8, 9]]


@pytest.fixture
def listed(make_dataset, tmp_path):
    """Return the path of a list of documents 0, 1 and 4 of `web`, and 2 of `code`."""
    datasets = [make_dataset("web", CORPUS), make_dataset("code", CORPUS[:3])]
    columns = (np.array([0, 0, 0, 1], np.int32), np.array([0, 1, 4, 2]), np.float32([0.5, 0.1, 0.25, 1]), np.arange(4))
    path = tmp_path / "mined.docs"
    write_document_list(path, DocumentList([describe_dataset(dataset) for dataset in datasets], *columns))
    return path


def test_a_list_is_read_as_it_was_written(listed):
    found = read_document_list(listed)
    assert is_document_list(listed)
    assert [found.chosen_of(index).tolist() for index in (0, 1)] == [[0, 1, 4], [2]]
    assert found.distance.tolist() == [0.5, np.float32(0.1), 0.25, 1]
    assert found.query.tolist() == [0, 1, 2, 3]
    assert [dataset.num_documents for dataset in open_listed_datasets(listed, found)] == [5, 3]
    assert [path.name for path in listed.parent.glob("*docs*")] == ["mined.docs"]


def test_lists_longer_than_a_block(listed, make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cpt.data.tokenfile.document_list._LINES_PER_WRITE", 2)
    found = read_document_list(listed)
    write_document_list(tmp_path / "again.docs", found)
    assert (tmp_path / "again.docs").read_bytes() == listed.read_bytes()


def test_an_empty_list(make_dataset, tmp_path):
    none = np.zeros(0, np.int64)
    datasets = [describe_dataset(make_dataset("web", CORPUS))]
    write_document_list(
        tmp_path / "none.docs", DocumentList(datasets, none.astype(np.int32), none, none.astype(np.float32), none)
    )
    assert read_document_list(tmp_path / "none.docs").num_chosen == 0


def test_datasets_may_be_relative_to_the_list(listed, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    text = listed.read_text()
    for name in ("web", "code"):
        text = text.replace(f'"{tmp_path / name}"', f'"{name}"')
        for end in (".bin", ".idx"):
            shutil.copy(tmp_path / f"{name}{end}", moved)
    (moved / "mined.docs").write_text(text)
    datasets = open_listed_datasets(moved / "mined.docs", read_document_list(moved / "mined.docs"))
    assert [dataset.prefix for dataset in datasets] == [str(moved / "web"), str(moved / "code")]


def test_another_dataset_under_the_same_name_is_refused(listed, make_dataset):
    make_dataset("code", [[1], [2], [3]])
    with pytest.raises(RefusedError, match=r"code: is not the dataset that .*mined\.docs was made of"):
        open_listed_datasets(listed, read_document_list(listed))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("megatron-cpt documents", "other", "first line is not the header"),
        ('"version":1', '"version":2', "format version 2, this software reads up to 1; update it"),
        ('{"dataset":0,"document":4', '{"dataset":0,"document":1', "line 4: dataset 0, document 1: it does not exist"),
        ('{"dataset":0,"document":4', '{"dataset":0,"document":5', "line 4: dataset 0, document 5: it does not exist"),
        ('{"dataset":1,"document":2', '{"dataset":2,"document":2', "line 5: dataset 2, document 2: it does not exist"),
        ('{"dataset":1,"document":2', '{"dataset":1,"document":-1', "line 5: dataset 1, document -1: it does"),
        ('{"dataset":1,"document":2', '{"dataset":1,"document":2.5', "line 5: not a chosen document"),
        ('"distance":0.25,', "", "line 4: not a chosen document"),
        ('{"dataset":1,', '{"dataset":1099511627776,', r"line 5: not a chosen document \(.*dataset: 1099511627776 is"),
        ('{"dataset":1,', '{"dataset":-9223372036854775808,', "line 5: not a chosen document"),
        ('"document":4', '"document":9223372036854775808', "line 4: not a chosen document"),
        ('"query":3', '"query":9223372036854775808', "line 5: not a chosen document"),
        ('"query":3', '"query":18446744073709551616', "line 5: not a chosen document .*query is an integer"),
        ('"distance":0.25', '"distance":1e300', "line 4: not a chosen document .*distance: 1e"),
        ('"distance":0.25', '"distance":"0.25"', "line 4: not a chosen document"),
        ('"documents":5', f'"documents":{10**30}', "line 1: .* not the header .*documents is an integer"),
        ('"documents":5', '"documents":9223372036854775808', "line 1: .* not the header .*out of range"),
        ('"documents":5', '"documents":true', "line 1: .* not the header"),
        ('"chosen":4', '"chosen":1e30', "line 1: .* not the header"),
        ('"version":1', '"version":0.5', "line 1: .* not the header"),
        ('"path":"', r'"path":"\u0000', "line 1: .* not the header .*zero byte"),
        ('{"dataset":1,"document":2,"distance":1.0,"query":3}\n', "", "has 3 of 4 documents; copy it again"),
        ('"query":3}\n', "", "line 5: not a chosen document"),
    ],
)
def test_damaged_lists_are_refused(listed, before, after, message):
    text = listed.read_text()
    assert before in text
    listed.write_text(text.replace(before, after))
    with pytest.raises(RefusedError, match=message):
        read_document_list(listed)


def test_a_missing_list(tmp_path):
    with pytest.raises(UserError, match="no such file; give a document list"):
        read_document_list(tmp_path / "none.docs")
