"""Small token files for the tests of the data package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.data.indexed import IndexedDataset, IndexedDatasetWriter

Documents = Sequence[Sequence[int]]


def write_documents(prefix: Path, documents: Documents, dtype: str = "<u2") -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    return IndexedDataset(prefix)


@pytest.fixture(scope="session")
def write_pair() -> Callable[..., IndexedDataset]:
    """write_pair(prefix, documents, dtype), for tests that make their own folders."""
    return write_documents


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """make_dataset(name, documents, dtype) writes a pair and opens it."""
    return lambda name, documents, dtype="<u2": write_documents(tmp_path / name, documents, dtype)


@pytest.fixture
def counting_dataset(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """counting_dataset(name, num_tokens, first) holds one document first, first + 1, ...: a token tells its place."""

    def make(name: str, num_tokens: int, first: int = 0) -> IndexedDataset:
        return write_documents(tmp_path / name, [range(first, first + num_tokens)], "<i4")

    return make
