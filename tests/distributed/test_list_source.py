"""A document list as a source: trained, validated, resumed and traced like a copy of its documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.data import IndexedDataset, IndexedDatasetWriter
from tests.helpers.document_lists import write_list
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import small_run, train_here

CHOSEN = [(pair, document) for pair in (0, 1) for document in range(pair, 60, 2)]


def train_twice(path: str, source: Sequence[str]) -> list[int]:
    """Train on the list and on the copy, in one process."""
    folder = Path(path).parent
    return [
        train_here(path, [f"output={folder / name}", f"sources.qa.path={place}", f"validation.sources.qa={place}"])
        for name, place in zip(("listed", "copied"), source, strict=True)
    ]


def lines(output: Path) -> list[tuple[object, ...]]:
    read = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss_by_source"), line.get("validation")) for line in read]


def test_equal_to_a_copy_of_the_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = {"reset_attention": True, "eod_id": 256}
    phase = {"name": "qa", "blend": {"qa": 0.7, "web": 0.3}}
    validation = {"sources": {"qa": "set below"}, "batches": 1}
    run = small_run(tmp_path, documents=documents, phases=[phase], validation=validation, stop_at_step=3)
    pairs = [IndexedDataset(tmp_path / "data" / name) for name in ("web", "code")]
    listed = write_list(tmp_path / "data" / "mined.docs", pairs, CHOSEN)
    with IndexedDatasetWriter(tmp_path / "data" / "copy", np.uint16) as writer:
        for pair, document in CHOSEN:
            writer.add_document(pairs[pair].document(document))
    assert run_ranks(1, train_twice, str(run), [str(listed), str(tmp_path / "data" / "copy")]) == [[0, 0]]
    assert lines(tmp_path / "listed") == lines(tmp_path / "copied")

    assert main(["trace", str(tmp_path / "listed"), "--step", "2", "--json"]) == 0
    samples = [one for one in json.loads(capsys.readouterr().out)["samples"] if one["source"] == "qa"]
    assert samples
    copy = IndexedDataset(tmp_path / "data" / "copy")
    for sample in samples:
        parts = [(IndexedDataset(part["prefix"]), part) for part in sample["documents"]]
        assert {(pairs[0].prefix, pairs[1].prefix).index(pair.prefix) for pair, _ in parts} <= {0, 1}
        ids = [pair.read(part["first_token"], part["num_tokens"]) for pair, part in parts]
        assert np.concatenate(ids).tolist() == copy.read(sample["first_token"], sample["num_tokens"]).tolist()
        assert all(pair.document_at(part["first_token"]) == part["document"] for pair, part in parts)

    write_list(listed, pairs, CHOSEN[1:])
    changes = [f"output={tmp_path / 'listed'}", f"sources.qa.path={listed}", f"validation.sources.qa={listed}"]
    with pytest.raises(RankError, match=r"data: the files of qa differ from the files that were read before"):
        run_ranks(1, train_here, str(run), [*changes, "stop_at_step=4"])
