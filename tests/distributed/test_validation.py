"""Held-out losses, and masks at document boundaries."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import EOD, read_metrics, train_several, write_source

LAYOUTS = [[], ["parallel.tensor=2"], ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]]


def _validation(folder: Path, data: Path) -> list[str]:
    # 3 samples and 5 global batches: less than one group of micro-batches, and more than one
    for name, documents in (("few", 1), ("many", 30)):
        write_source(data / name, stride=1, documents=documents, seed=1)
    sources = f"{{few: {data / 'few'}, many: {data / 'many'}}}"
    return [f"validation={{every: 2, batches: 5, sources: {sources}}}", "stop_at_step=3", "log.every=2"]


def test_held_out_losses_do_not_depend_on_the_layout(run_file: Path, base: Path) -> None:
    folder = run_file.parent / "validation"
    common = [f"init.from={base}", *_validation(folder, folder / "data")]
    arguments = [[*common, *layout, f"output={folder}/{number}"] for number, layout in enumerate(LAYOUTS)]
    one_batch = ["stop_at_step=1", "validation.batches=1"]
    arguments += [[*common, *one_batch, f"seed={seed}", f"output={folder}/seed-{seed}"] for seed in (7, 8)]
    run_ranks(2, train_several, str(run_file), arguments)
    first, *others = (read_metrics(folder / str(number), "validation") for number in range(len(LAYOUTS)))
    assert [line["step"] for line in first] == [0, 2, 3], "before the first step, every second, and after the last"
    assert first[0]["validation"]["many"] > first[-1]["validation"]["many"]
    for lines in others:
        for a, b in zip(first, lines, strict=True):
            assert b["validation"] == pytest.approx(a["validation"], rel=1e-5)
    assert [line["step"] for line in read_metrics(folder / "0")] == [2, 3]
    # Each line counts the validation before it, after step 0 and after step 2.
    assert all(line["pause_seconds"] > 0 for line in read_metrics(folder / "0"))
    before = [read_metrics(folder / f"seed-{seed}", "validation")[0]["validation"] for seed in (7, 8)]
    assert before[0] == before[1], "the seed of a run does not choose its held-out samples"
    assert before[0]["many"] != first[0]["validation"]["many"]
    page = (folder / "0" / "report.html").read_text()
    assert "Learned:" in page
    assert "3 of 20 steps" in page
    start, stop = map(orjson.loads, (folder / "0" / "events.jsonl").read_bytes().splitlines())
    assert (start["event"], start["resumed"], start["ranks"]) == ("start", False, 2)
    assert (stop["event"], stop["step"], stop["reason"]) == ("stop", 3, "")


def test_document_masks_reach_the_model(run_file: Path, base: Path) -> None:
    """Each option changes the loss, except resetting positions: RoPE only sees differences of positions."""
    folder = run_file.parent / "documents"
    common = [f"init.from={base}", f"documents.eod_id={EOD}", "stop_at_step=1"]
    options = {
        "plain": [],
        "no-eod-loss": ["documents.eod_loss=false"],
        "reset": ["documents.reset_attention=true"],
        "reset-both": ["documents.reset_attention=true", "documents.reset_positions=true"],
    }
    runs = [[*common, *option, f"output={folder}/{name}"] for name, option in options.items()]
    run_ranks(1, train_several, str(run_file), runs)
    loss = {name: read_metrics(folder / name)[0]["loss"] for name in options}
    assert loss["no-eod-loss"] != loss["plain"]
    assert loss["reset"] != loss["plain"]
    assert loss["reset-both"] == loss["reset"]
