"""The command `mine`: its report, its exit statuses, and a missing package."""

from __future__ import annotations

import json

import orjson
import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.tokenfile.document_list import read_document_list
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter
from tests.helpers.static_model import plant, write_static_model


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Function that runs `mine` on a corpus with the options that follow; returns the status."""
    monkeypatch.chdir(tmp_path)
    planted = plant(200, 10)
    with IndexedDatasetWriter("web", "<u2") as writer:
        for text in planted.documents:
            writer.add_document([*text.encode(), 256])
    with open("qa.jsonl", "wb") as lines:
        lines.writelines(orjson.dumps({"q": text[:50], "a": text[50:]}) + b"\n" for text in planted.queries)
    with open("test.jsonl", "wb") as lines:
        lines.write(orjson.dumps({"text": planted.documents[planted.planted[0]]}) + b"\n")
    model = write_static_model(tmp_path / "static")
    usual = ["--queries", "qa.jsonl", "--key", "q", "a", "--corpus", "web", "--embedder", model, "--tokenizer", "byte"]
    return lambda *options: main(["mine", *usual, "--k", "3", "--workers", "1", *options])


def test_the_report(call, capsys):
    assert call("--output", "mined") == 0
    lines = capsys.readouterr().out.splitlines()
    count = IndexedDataset("mined").num_documents
    assert lines[0].startswith(f"mined: {count} of 200 documents, ")
    assert lines[1].startswith(f"  web: {count} of 200 documents, ")
    assert lines[2].startswith("search: flat, found all exact neighbors of a sample of queries; ")
    assert lines[3].startswith("dropped: 0 near-duplicates of their query, 0 of a nearer document")
    assert lines[4].startswith("distance to the nearest query (1 - cosine): 0% 0.")
    assert len(lines) == 5 + 2 * min(20, count)


def test_json_and_shards(call, capsys):
    for part in ("0/2", "1/2"):
        assert call("--output", "mined.docs", "--shard", part, "--range-documents", "50") == 0
    assert "shard 1 of 2 is ready; when all shards are ready, run --join 2" in capsys.readouterr().out
    assert call("--output", "mined.docs", "--join", "2", "--range-documents", "50", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chosen"] == read_document_list("mined.docs").num_chosen
    assert report["corpora"][0]["documents"] == 200


def test_held_out_documents(call, capsys):
    assert call("--output", "mined", "--held-out", "test.jsonl") == 3
    assert "1 of " in capsys.readouterr().err
    assert call("--output", "mined", "--held-out", "test.jsonl", "--overlap", "drop") == 0
    assert "held-out: dropped 1 documents, with text of 1 ones" in capsys.readouterr().out
    assert call("--output", "mined") == 2
    assert "--overwrite" in capsys.readouterr().err
