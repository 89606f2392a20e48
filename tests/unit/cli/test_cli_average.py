"""`megatron-cpt average`: what it prints, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli import main
from megatron_cpt.cli.arguments import repeat_options
from megatron_cpt.cli.commands.checkpoints import average_command, evaluate_command
from tests.helpers.random_checkpoints import RandomCheckpoint, trained


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Run directory with checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        RandomCheckpoint(seed=step, state=trained(step), run={"tokenizer": "byte"}).write(folder)
    return tmp_path / "run"


def test_the_last_checkpoints_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["average", "--run", str(run), "--last", "2", "--decay", "minus-sqrt", "--output", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weights: minus-sqrt"
    assert lines[1].split() == ["0.707107", f"{run}/checkpoints/step-00000020", "(step", "20)"]
    assert lines[2].split() == ["0.292893", f"{run}/checkpoints/step-00000030", "(step", "30)"]
    assert lines[-1].startswith(f"{out}: 20 tensors, 45.02K parameters with padding, ")


def test_given_weights_and_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, newest = str(run / "checkpoints" / "step-00000010"), str(run)  # a run directory is its newest checkpoint
    arguments = ["average", first, newest, "--output", str(tmp_path / "out"), "--weights", "0.75", "0.25", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(entry["step"], entry["weight"]) for entry in report["inputs"]] == [(10, 0.75), (30, 0.25)]


def test_evaluate_gets_the_result_and_the_tasks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def evaluate(model: Path, **options: Any) -> None:
        calls.append((model, options, (model / "manifest.json").is_file()))

    monkeypatch.setattr(evaluate_command, "evaluate", evaluate)
    monkeypatch.setattr(average_command, "require_module", lambda module: None)
    out = tmp_path / "out"
    words = ["average", "--run", str(run), "--last", "3", "--output", str(out), "--evaluate", "mmlu", "piqa"]
    assert main([*words, "--limit", "5"]) == 0
    assert calls == [(out, {"tasks": ["mmlu", "piqa"], "limit": 5}, True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "{run}", "--last", "4"], "has 3: step-00000010, step-00000020, step-00000030"),
        (["--run", "{run}"], "--run RUN_DIR --last N"),
        (["--last", "2", "{run}"], "--run RUN_DIR --last N"),
        (["{run}", "--run", "{run}", "--last", "2"], "--run RUN_DIR --last N"),
        (["--run", "{run}", "--last", "1"], "--last"),
        ([], "at least two checkpoints"),
        (["--run", "{run}", "--last", "2", "--weights", "0.5", "0.5", "--decay", "linear"], "omit one"),
        (["--run", "{run}", "--last", "2", "--weights", "1.5", "-0.5"], "-0.5: not above 0"),
        (["--run", "{run}", "--last", "2", "--weights", "half", "half"], "--weights"),
        (["--run", "{run}", "--last", "2", "--decay", "sqrt"], "--decay"),
        (["--run", "{run}", "--last", "2", "--limit", "2"], "--limit"),
    ],
)
def test_mistakes_end_with_status_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    words = [word.format(run=run) for word in arguments]
    assert main(["average", "--output", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_evaluation_that_cannot_run_is_no_late_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["average", "--run", str(run), "--last", "2", "--output", str(tmp_path / "out"), "--evaluate", "mmlu"]
    assert main(words) == 2
    assert "lm_eval is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_negative_number_is_a_value() -> None:
    words = repeat_options(["average", "a", "--weights", "2", "-1", "-.5", "-1e-3", "--output", "c"])
    assert " ".join(words) == "average a --weights 2 --weights -1 --weights -.5 --weights -1e-3 --output c"
