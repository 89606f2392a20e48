"""The command `evaluate`: its messages and its table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli import main
from megatron_cpt.cli.arguments import repeat_options
from megatron_cpt.cli.commands.checkpoints.evaluate_command import evaluation_progress
from megatron_cpt.errors import EXIT_USER
from megatron_cpt.views.evaluation_table import render_evaluation
from tests.helpers.evaluation import write_tasks

EVALUATION: dict[str, Any] = {
    "results": {
        "piqa": {"acc": 0.5, "acc_stderr": 0.0354, "bits_per_byte": 1.25, "exact_match,strict": None},
        "wiki": {"word_perplexity": 123456.0, "word_perplexity_stderr": 1e30},
        "all": {"acc": 0.5},
    },
    "tasks": {
        "piqa": {"documents": 200, "of_documents": 1838, "num_fewshot": 5, "higher_is_better": {"acc": True}},
        "wiki": {"documents": 8, "of_documents": 8, "num_fewshot": 0, "higher_is_better": {"word_perplexity": False}},
    },
    "groups": {"all": ["piqa", "inner"], "inner": ["wiki"]},
    "model": {"path": "runs/a", "step": 2000},
    "requests": {"total": 408, "answered_from_cache": 200, "truncated": 1},
    "config": {"max_length": 2048},
}


def test_the_table_shows_bits_per_byte_first_and_every_standard_error() -> None:
    stream = io.StringIO()
    render_evaluation(EVALUATION, stream)
    text = stream.getvalue()
    rows = [line.split() for line in text.splitlines()]
    assert "runs/a, step 2,000: 408 requests, 200 of them answered from earlier evaluations" in text
    assert ["piqa", "bits_per_byte", "1.2500", "200", "of", "1,838", "5"] in rows
    assert ["acc", "0.5000", "±", "0.0354", "higher", "200", "of", "1,838", "5"] in rows
    assert ["exact_match,strict", "NaN", "200", "of", "1,838", "5"] in rows
    assert ["wiki", "word_perplexity", "1.235e+05", "±", "1e+30", "lower", "8", "of", "8", "0"] in rows
    assert ["all", "acc", "0.5000", "higher", "mean", "of", "1", "task"] in rows
    assert "note: 1 prompt longer than the model's 2,048 tokens lost their beginning" in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize(
    ("finished", "is_kept", "message"),
    [
        (3, True, "interrupted: 3 finished requests are kept; run the same command again"),
        (1, False, "interrupted: 1 finished request is lost; --output FILE.json keeps them"),
        (0, True, "interrupted: no request was finished"),
    ],
)
def test_an_interrupted_evaluation_says_what_is_kept(
    finished: int, is_kept: bool, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        with evaluation_progress(is_main=True, is_kept=is_kept) as advance:
            advance(0, 8)
            advance(finished, 8)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert message in capfd.readouterr().err


def test_tasks_end_at_the_next_option_or_override() -> None:
    words = ["evaluate", "runs/a", "--tasks", "one", "two", "parallel.tensor=2", "--limit", "3"]
    expected = ["evaluate", "runs/a", "--tasks", "one", "--tasks", "two", "parallel.tensor=2", "--limit", "3"]
    assert repeat_options(words) == expected
    files = ["evaluate", "runs/a", "--tasks", "one", "two.yaml"]
    assert repeat_options(files) == ["evaluate", "runs/a", "--tasks", "one", "--tasks", "two.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--tasks: give at least one task"),
        (["--tasks", "a", "--log-samples"], "--log-samples: writes beside the output; give --output FILE"),
        (["--tasks", "a", "--output", "."], "--output .: is a folder; give the name of a file"),
        (["--tasks", "a", "--output", "a", "--cache", "./a"], "--output a: the file of finished requests"),
        (
            ["--tasks", "a", "--output", "a", "--cache", "a.samples.jsonl", "--log-samples"],
            "--cache a.samples.jsonl: -",
        ),
        (["--tasks", "a", "--output", "a", "--cache", "."], "--cache .: is a folder; give the name of a file"),
        (["--tasks", "a", "--output", f"{__file__}/a"], f"--output {__file__}/a: {__file__} is not a folder"),
        (["--tasks", "a", "--include-path", "none"], "include_path: none: no such folder"),
    ],
)
def test_a_mistake_is_one_message(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    assert main(["evaluate", "nowhere", *words]) == EXIT_USER
    captured = capfd.readouterr()
    (error,) = [line for line in captured.err.splitlines() if "torch/utils" not in line]  # torch for CUDA on a CPU
    assert error.startswith(f"megatron-cpt: error: {message}")
    assert captured.out == ""


def test_a_refused_evaluation_creates_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    write_tasks(tmp_path / "tasks")
    words = ["--tasks", "colors", "--include-path", str(tmp_path / "tasks"), "--output", str(tmp_path / "new/a.json")]
    assert main(["evaluate", "nowhere", *words]) == EXIT_USER
    assert "nowhere" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


@pytest.mark.parametrize("name", ["run.yaml", "plan.json", "metrics.jsonl", "plans.jsonl"])
def test_no_output_replaces_a_file_of_a_run(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Before, `report --output RUN/metrics.jsonl` replaced all metrics by a page."""
    pytest.importorskip("lm_eval")
    (tmp_path / name).write_text("{}\n")
    output = ["--output", str(tmp_path / name)]
    assert main(["evaluate", "nowhere", "--tasks", "a", *output]) == EXIT_USER
    assert main(["report", str(tmp_path), *output]) == EXIT_USER
    assert main(["report", str(tmp_path), "--markdown", *output]) == EXIT_USER
    assert capfd.readouterr().err.count("would replace a file of a run or a checkpoint") == 3 - (name == "plans.jsonl")
    assert (tmp_path / name).read_text() == "{}\n"


def test_a_missing_harness_names_the_extra(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else original(name, *rest)
    )
    assert main(["evaluate", "nowhere", "--tasks", "a"]) == EXIT_USER
    assert "lm_eval is not installed; pip install -e" in capfd.readouterr().err
