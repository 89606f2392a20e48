"""Fixtures for unit tests: a small run and small token files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run_data() -> dict[str, Any]:
    """Plain data of a valid run: 100 steps of 8 x 64 tokens, two phases, three sources with declared sizes."""
    return {
        "name": "small",
        "output": "runs/small",
        "model": {"preset": "tiny_nemotron"},
        "seq_length": 64,
        "batch": {"global": 8, "micro": 2},
        "tokens": 51_200,
        "schedule": {"shape": "cosine", "max_lr": 1.0e-3, "min_lr": 1.0e-5},
        "sources": {
            "web": {"path": "data/web", "tokens": "1M"},
            "code": {"path": "data/code", "tokens": "500K"},
            "qa": {"path": "data/qa", "tokens": 20_000, "max_epochs": 4},
        },
        "phases": [
            {"name": "general", "blend": {"web": 0.6, "code": 0.4}, "until": {"lr": 0.2}},
            {"name": "qa", "blend": {"web": 0.5, "code": 0.4, "qa": 0.1}},
        ],
    }


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Function that writes plain data to a run.yaml and returns its path."""

    def write(data: dict[str, Any]) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


Documents = Sequence[Sequence[int]]


def write_documents(prefix: Path, documents: Documents, dtype: str = "<u2") -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    return IndexedDataset(prefix)


@pytest.fixture(scope="session")
def write_pair() -> Callable[..., IndexedDataset]:
    """Function `write_pair(prefix, documents, dtype)`, for tests that create their own folders."""
    return write_documents


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """Function `make_dataset(name, documents, dtype)` that writes a pair of .bin/.idx and opens it."""
    return lambda name, documents, dtype="<u2": write_documents(tmp_path / name, documents, dtype)


@pytest.fixture
def counting_dataset(tmp_path: Path) -> Callable[..., IndexedDataset]:
    """Function `counting_dataset(name, num_tokens, first)`: one document with tokens first, first + 1, ..."""

    def make(name: str, num_tokens: int, first: int = 0) -> IndexedDataset:
        return write_documents(tmp_path / name, [range(first, first + num_tokens)], "<i4")

    return make
