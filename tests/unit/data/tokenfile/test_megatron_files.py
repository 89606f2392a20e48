"""Fixtures written by two versions of megatron-core: the reader reads them, and the writer gives equal bytes."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter
from tests.fixtures.make_megatron_files import DOCUMENTS

FIXTURES = Path(__file__).parents[3] / "fixtures"
VERSIONS = ["0.16", "0.19"]
FILES = [(version, name) for version in VERSIONS for name in DOCUMENTS]


@pytest.fixture
def prefix(request) -> Path:
    version, name = request.param
    return FIXTURES / f"megatron_core_{version}" / name


@pytest.mark.parametrize("prefix", FILES, indirect=True, ids="-".join)
def test_read(prefix):
    dtype, documents = DOCUMENTS[prefix.name]
    ours = IndexedDataset(prefix)
    assert ours.dtype == dtype
    expected = [list(chain.from_iterable(sequences)) for sequences in documents]
    assert [ours.document(i).tolist() for i in range(ours.num_documents)] == expected
    assert ours.sizes.tolist() == [len(sequence) for sequences in documents for sequence in sequences]


# our writer makes one sequence a document
@pytest.mark.parametrize("prefix", [file for file in FILES if file[1] != "sequences"], indirect=True, ids="-".join)
def test_written_by_us_they_are_the_same_bytes(tmp_path, prefix):
    dtype, documents = DOCUMENTS[prefix.name]
    with IndexedDatasetWriter(tmp_path / "ours", dtype) as writer:
        for sequences in documents:
            writer.add_document(list(chain.from_iterable(sequences)))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == Path(f"{prefix}{ending}").read_bytes()


# it cannot map an empty .bin
@pytest.mark.parametrize("prefix", [file for file in FILES if file[1] != "empty"], indirect=True, ids="-".join)
def test_they_are_what_the_installed_megatron_core_reads(prefix):
    mcore = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    sequences = [sequence for document in DOCUMENTS[prefix.name][1] for sequence in document]
    theirs = mcore.IndexedDataset(str(prefix))
    assert [theirs[i].tolist() for i in range(len(theirs))] == sequences
