"""`megatron-cpt trace` on a trained run: it names exactly the samples that the loader has read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli import main
from megatron_cpt.data import TokenStream
from megatron_cpt.data.loading import loader
from megatron_cpt.data.loading.samples import read_samples
from megatron_cpt.provenance.plans_file import read_plan_records
from megatron_cpt.provenance.run_history import read_history
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import train_here

BATCH = 8
CHANGED = (
    "phases=[{name: general, blend: {web: 0.2, code: 0.8}, until: {lr: 0.2}}, {name: qa, blend: {web: 0.5, qa: 0.5}}]"
)


def train_and_listen(path: str, overrides: Sequence[str], allow: Sequence[str]) -> list[tuple[str, int]]:
    """Train, and return (source, sample index) of every sample that the loader read, in order."""
    heard: list[tuple[str, int]] = []

    def listen(streams: Sequence[TokenStream], sources: Any, indices: Any, *rest: Any) -> Any:
        heard.extend((streams[source].name, int(i)) for source, i in zip(sources, indices, strict=True))
        return read_samples(streams, sources, indices, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "read_samples", listen)
        assert train_here(path, overrides, allow) == 0
    return heard


def test_trace_names_what_training_read(run_file: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    common = [f"output={output}", "checkpoint.every=6", "checkpoint.keep=9", "tokenizer=byte", "model.vocab=384"]
    (first,) = run_ranks(1, train_and_listen, str(run_file), [*common, "stop_at_step=8"], [])
    (second,) = run_ranks(1, train_and_listen, str(run_file), [*common, CHANGED], ["blend"])
    heard = [*first[: 8 * BATCH], *second]  # the first process read ahead
    assert len(heard) == 20 * BATCH
    for step in (1, 6, 7, 8, 9, 13, 16, 20):
        assert main(["trace", str(output), "--step", str(step), "--json"]) == 0
        plain = json.loads(capsys.readouterr().out)
        found = [(sample["source"], sample["k"]) for sample in plain["samples"]]
        assert found == heard[(step - 1) * BATCH : step * BATCH]
        assert plain["confirmed_by"]
        for sample in plain["samples"]:
            assert sum(part["num_tokens"] for part in sample["documents"]) == sample["num_tokens"] == 33
            assert all(isinstance(part["text"], str) for part in sample["documents"])
    records = read_plan_records(output)
    assert [record.after_step for record in records] == [0, 8]
    recorded, _ = read_history(output)
    assert [one.step for one in recorded if records[0].has(one)] == [6, 8]
    assert [one.step for one in recorded if records[1].has(one)] == [12, 18, 20]
    assert main(["trace", str(output), "--step", "9"]) == 0
    assert "step 9, phase general: 8 samples" in capsys.readouterr().out
    assert main(["trace", str(output), "--step", "9", "--sample", "2"]) == 0
    assert "sample 2: " in capsys.readouterr().out
    assert main(["trace", str(output), "--step", "21"]) == 2
    assert "the steps of" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "none"), "--step", "1"]) == 2
