"""Batch ramp-up and phases with other lengths: exact restarts, one order of samples, every change reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.preflight import find_changes, refuse_unless_allowed
from megatron_cpt.cli import main
from megatron_cpt.errors import RefusedError
from megatron_cpt.prepare import prepare_run
from megatron_cpt.train.state import TrainState, check_progress
from tests.helpers.checkpoints import differing
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import (
    newest,
    read_metrics,
    read_reproducible_metrics,
    small_run,
    train_here,
    train_several,
    write_source,
)

# (global batch, sequence length) of every step
SHAPES = [(4, 32)] * 3 + [(8, 32)] + [(12, 32)] * 4 + [(4, 128)] * 4 + [(12, 64)] * 3
TOKENS = sum(batch * length for batch, length in SHAPES)


@pytest.fixture(scope="module")
def ramp_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ramp")
    phases = [
        {"name": "short", "blend": {"web": 0.6, "code": 0.4}, "until": {"step": 8}},
        {
            "name": "long",
            "blend": {"web": 0.5, "code": 0.3, "qa": 0.2},
            "until": {"step": 12},
            "seq_length": 128,
            "batch": {"global": 4, "micro": 1},
        },
        {"name": "middle", "blend": {"web": 0.5, "code": 0.5}, "seq_length": 64},
    ]
    batch = {"global": 12, "micro": 2, "ramp_up": {"start": 4, "increment": 4, "samples": 20}}
    validation = {"every": 5, "batches": 1, "sources": {"web": str(folder / "data" / "web")}}
    path = small_run(folder, batch=batch, tokens=TOKENS, phases=phases, validation=validation)
    for stride, name in enumerate(("web", "code", "qa"), start=1):
        write_source(folder / "data" / name, stride=stride, documents=900)  # windows of about 12 spans
    return path


@pytest.fixture(scope="module")
def outputs(ramp_file: Path) -> Path:
    """Train with DP 2 without a stop and with stops in the ramp, at both switches and between; and with PP 2."""
    folder = ramp_file.parent
    stops = [f"stop_at_step={stop}" for stop in (2, 4, 8, 10, 12, 14)]
    runs = [
        [f"output={folder}/whole"],
        *([f"output={folder}/parts", stop] for stop in stops),
        [f"output={folder}/parts"],
        [f"output={folder}/pipeline", "parallel.pipeline=2"],
    ]
    assert run_ranks(2, train_several, str(ramp_file), runs, timeout=480) == [[0] * len(runs)] * 2
    return folder


def test_stopped_anywhere_equals_unbroken_to_the_bit(outputs: Path) -> None:
    assert newest(outputs / "whole").name == f"step-{len(SHAPES):08d}"
    assert differing(newest(outputs / "whole"), newest(outputs / "parts")) == []
    assert read_reproducible_metrics(outputs / "whole") == read_reproducible_metrics(outputs / "parts")


def test_every_step_has_the_shape_of_the_plan(outputs: Path) -> None:
    lines = read_metrics(outputs / "whole")
    assert [(line["global_batch"], line["seq_length"]) for line in lines] == SHAPES
    done = 0
    for line, (batch, length) in zip(lines, SHAPES, strict=True):
        done += batch * length
        assert line["tokens"] == done
    plan = json.loads((outputs / "whole" / "plan.json").read_text())
    assert plan["tokens_trained"] == TOKENS == done
    assert sum(lines[-1]["samples_by_source"].values()) == sum(batch for batch, _ in SHAPES)


def test_validation_keeps_its_length(outputs: Path) -> None:
    steps = [line["step"] for line in read_metrics(outputs / "whole", "validation")]
    assert steps == [0, 5, 10, 15]


def test_pipeline_stages_follow_the_shape(outputs: Path) -> None:
    pairs = zip(read_metrics(outputs / "whole"), read_metrics(outputs / "pipeline"), strict=True)
    for whole, pipeline in pairs:
        assert pipeline["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert pipeline["samples_by_source"] == whole["samples_by_source"]


def test_trace_knows_lengths_and_batches(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[tuple[str, int], set[int]] = {}
    for step, (batch, length) in enumerate(SHAPES, start=1):
        assert main(["trace", str(outputs / "parts"), "--step", str(step), "--json"]) == 0
        samples = json.loads(capsys.readouterr().out)["samples"]
        assert len(samples) == batch
        assert {sample["num_tokens"] for sample in samples} == {length + 1}
        for sample in samples:
            tokens = set(range(sample["first_token"], sample["first_token"] + length))
            of_epoch = seen.setdefault((sample["source"], sample["epoch"]), set())
            assert not tokens & of_epoch  # nothing is read twice because the length changed
            of_epoch |= tokens


@pytest.mark.parametrize(
    ("change", "allow", "text"),
    [
        ("batch.ramp_up.samples=30", [], "- ramp_up: samples 20 -> 30"),
        ("batch.ramp_up.samples=30", ["ramp_up"], "its 4 steps read 20 samples and 640 tokens; under this plan they"),
        ("phases.middle.seq_length=32", [], "- phase_length: middle 64 -> 32"),
        ("phases.long.batch.global=8", [], "- phase_batch: long 4 -> 8"),
        ("phases.long.seq_length=256", ["phase_length"], "- seq_length: source web 128 -> 256, source code 128 -> 256"),
    ],
)
def test_changes_are_named_and_refused(ramp_file: Path, tmp_path: Path, change: str, allow: list, text: str) -> None:
    before = prepare_run(ramp_file, need_files=True)
    after = prepare_run(ramp_file, [change], need_files=True)
    done = before.plan.after(4)
    state = TrainState(4, done.tokens, {}, {"sample": done.samples})

    def resume() -> None:
        refuse_unless_allowed(find_changes(before.config.to_dict(), after.config, {}, {}), allow, "here")
        check_progress(state, after.plan, "here")

    with pytest.raises(RefusedError) as caught:
        resume()
    assert text in str(caught.value)


def test_what_comes_later_may_be_changed(ramp_file: Path, outputs: Path) -> None:
    """A run in its first phase may change the batch and length of its later phases."""
    output = ramp_file.parent / "later"
    run_ranks(1, train_here, str(ramp_file), [f"output={output}", "stop_at_step=2"])
    changes = ["phases.long.batch.global=2", "phases.middle.seq_length=32", "stop_at_step=14"]
    with pytest.raises(RankError, match="phase_length"):
        run_ranks(1, train_here, str(ramp_file), [f"output={output}", *changes])
    run_ranks(1, train_here, str(ramp_file), [f"output={output}", *changes], ["phase_length", "phase_batch"])
    shapes = [(line["global_batch"], line["seq_length"]) for line in read_metrics(output)]
    assert shapes == [*SHAPES[:8], *[(2, 128)] * 4, *[(12, 32)] * 2]
