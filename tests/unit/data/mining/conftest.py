"""Static model, a corpus with planted paraphrases, and a function that mines it."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from megatron_cpt.data.mining.mining import mine
from megatron_cpt.data.mining.mining_job import MiningOptions
from megatron_cpt.data.tokenfile.reader import IndexedDatasetWriter
from megatron_cpt.data.tokenfile.sidecar import Origin
from tests.helpers.static_model import PlantedCorpus, plant, write_static_model

EOD = 256


@pytest.fixture(scope="session")
def static_model(tmp_path_factory) -> str:
    return write_static_model(tmp_path_factory.mktemp("static"))


@pytest.fixture(scope="session")
def planted() -> PlantedCorpus:
    return plant(1200, 40)


def write_texts(prefix, texts) -> str:
    """Write texts as a dataset of the byte tokenizer, with a sidecar."""
    origin = Origin(tokenizer="byte", fingerprint="byte", eod_id=EOD)
    with IndexedDatasetWriter(prefix, "<u2", origin=origin) as writer:
        for text in texts:
            writer.add_document([*text.encode(), EOD])
    return str(prefix)


def write_lines(path: Path, rows) -> str:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return str(path)


@pytest.fixture
def mining(tmp_path, static_model, planted):
    """Function that mines the planted corpus, in two datasets, into `tmp_path / name`."""
    half = len(planted.documents) // 2
    corpus = [
        write_texts(tmp_path / "web", planted.documents[:half]),
        write_texts(tmp_path / "code", planted.documents[half:]),
    ]
    queries = write_lines(tmp_path / "qa.jsonl", [{"text": text} for text in planted.queries])

    def run(name, **options):
        defaults = {"workers": 1, "k": 5, "range_documents": 160}
        return mine(
            [queries], corpus, tmp_path / name, embedder=static_model, options=MiningOptions(**defaults | options)
        )

    return run
