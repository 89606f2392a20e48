"""`evaluate` at several layouts against the harness's `hf` backend, and evaluations during training."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

pytest.importorskip("lm_eval")

from megatron_cpt.backend.collectives import on_main
from megatron_cpt.backend.distributed import job_group
from megatron_cpt.data.tokenizers.tokenizer import ByteTokenizer
from megatron_cpt.errors import EXIT_OK, EXIT_STOPPED, RefusedError, UserError
from megatron_cpt.evaluate.evaluate_checkpoint import EvaluateOptions, evaluate
from megatron_cpt.evaluate.harness import LoadedTasks, TaskChoice
from megatron_cpt.evaluate.ranks import LeadingEngine
from megatron_cpt.evaluate.requests import Score, ScoreRequest
from megatron_cpt.hooks import Hook
from tests.helpers.checkpoints import differing
from tests.helpers.evaluation import TASKS, ArithmeticEngine, save_model_with_tokenizer, write_tasks
from tests.helpers.faults import flip_bit
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, train_here, train_with_hooks

LAYOUTS: dict[str, list[str]] = {
    "TP2 x PP2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "PP2 x DP2": ["parallel.pipeline=2"],
    "DP4": [],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def options(tasks: Path, **changes: Any) -> EvaluateOptions:
    return EvaluateOptions(include_path=str(tasks), **changes)


def evaluate_layouts(model: Path, tasks: Path, output: Path) -> None:
    """Evaluate at every layout, in the same processes; two fail and must leave the processes usable."""
    for name, overrides in LAYOUTS.items():
        evaluate(model, TASKS, output / f"{name}.json", options(tasks, overrides=overrides, cache=output / name))
    for changes in ({"overrides": ["parallel.tensor=3"]}, {"include_path": "none"}):
        with pytest.raises(UserError):
            evaluate(model, ["colors"], None, replace(options(tasks), **changes))


def answers(path: Path) -> dict[str, list[Any]]:
    samples = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    return {name: [one["filtered_resps"] for one in samples if one["task"] == name] for name in TASKS}


@pytest.mark.long
def test_every_layout_gives_what_the_hf_backend_gives(tasks: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model = save_model_with_tokenizer(tmp_path / "hf", template="<s> $A")
    run_ranks(4, evaluate_layouts, model, tasks, tmp_path)
    theirs = HFLM(pretrained=str(model), dtype="float32", device="cpu", max_length=64)
    expected = LoadedTasks(TaskChoice(names=TASKS, include_path=str(tasks))).run(theirs, bootstrap=0)
    for name in LAYOUTS:
        found = orjson.loads((tmp_path / f"{name}.json").read_bytes())
        assert found["config"]["parallel"]["pipeline"] == (2 if "PP2" in name else 1)
        for task, metrics in expected.metrics.items():
            own = {metric: found["results"][task][metric] for metric in metrics}
            assert own == pytest.approx(metrics, rel=1e-4), (name, task)
    assert not list(tmp_path.glob(".hf-*")), "temporary imports are deleted"


def test_a_signal_to_the_launcher_ends_an_evaluation_with_75(tmp_path: Path) -> None:
    """Before: an error that blamed the task, tracebacks of gloo and torchrun, and status 1."""
    model, folder = save_model_with_tokenizer(tmp_path / "hf"), write_tasks(tmp_path / "tasks")
    documents = folder / "documents.jsonl"
    rows = [orjson.loads(line) for line in documents.read_bytes().splitlines()]
    many = [{**row, "object": f"{row['object']} {number}"} for number in range(400) for row in rows]
    documents.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in many))
    command = [sys.executable, "-m", "megatron_cpt", "launch", "--nproc-per-node", "2", "--", "evaluate", str(model)]
    command += ["--tasks", "colors", "--include-path", str(folder), "--output", str(tmp_path / "out" / "results.json")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        cache = tmp_path / "out" / "finished_requests.sqlite"
        while process.poll() is None and not (cache.exists() and cache.stat().st_size > 16_000):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
    assert process.returncode == EXIT_STOPPED, error
    assert re.search(r"interrupted: [\d,]+ finished requests are kept; run the same command again", error)
    assert "Traceback" not in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == [cache.name]


def test_an_interrupted_evaluation_resumes_and_a_second_one_reads(tasks: Path, tmp_path: Path) -> None:
    model = save_model_with_tokenizer(tmp_path / "hf")
    expected = evaluate(model, TASKS, tmp_path / "once" / "r.json", options(tasks, log_samples=True, batch_size=1))
    assert expected is not None
    total = expected["requests"]["total"]
    done = 0

    def kill(amount: int, _total: int) -> None:
        nonlocal done
        done += amount
        if done >= 0.6 * total:
            raise KeyboardInterrupt

    output = tmp_path / "twice" / "results.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, TASKS, output, options(tasks, batch_size=1), advance=kill)
    assert not output.exists()
    output.write_bytes(orjson.dumps(expected)[:100])  # cut in half by another program
    found = evaluate(model, TASKS, output, options(tasks, log_samples=True, batch_size=4))
    assert found is not None
    assert found["results"] == expected["results"]
    assert answers(output.with_name("results.samples.jsonl")) == answers(tmp_path / "once" / "r.samples.jsonl")
    assert 0.6 * total <= found["requests"]["answered_from_cache"] < total
    assert orjson.loads(output.read_bytes())["results"] == expected["results"]

    again = evaluate(model, TASKS, output, options(tasks))
    assert again is not None
    assert (again["results"], again["requests"]["answered_from_cache"]) == (expected["results"], total)
    assert again["requests"]["forward_tokens"] == 0
    assert again["digests"] == expected["digests"]


def terminate(*_: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_leaves_no_temporary_import(tasks: Path, tmp_path: Path) -> None:
    """Before, a folder of the model's size was left beside the output after each try."""
    hf = save_model_with_tokenizer(tmp_path / "hf")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        evaluate(hf, TASKS, tmp_path / "out" / "r.json", options(tasks), advance=terminate)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["finished_requests.sqlite"]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_path_that_is_not_utf_8_is_shown_with_escapes(base: Path, tasks: Path, tmp_path: Path) -> None:
    """Before: a traceback after the last request."""
    checkpoint = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(newest(base), checkpoint)
    found = evaluate(checkpoint, ["colors"], tmp_path / "r.json", options(tasks, tokenizer="byte"))
    assert found is not None
    assert found["model"]["path"].endswith(r"/caf\xe9")


def ask_for_too_long_an_answer() -> None:
    """Let the engine of every rank refuse a request; the job must stay usable."""
    with job_group(timeout=600.0):
        engine = LeadingEngine(RefusingEngine(), ByteTokenizer(), 2)
        for _ in range(2):
            with pytest.raises(UserError, match="too long"):
                engine.lead(lambda: engine.score([ScoreRequest((1,), (2,))], {}, lambda batch: None))
        assert on_main(lambda: "usable") == "usable"


class RefusingEngine(ArithmeticEngine):
    def score(self, requests: Sequence[ScoreRequest], **options: Any) -> list[Score]:
        raise UserError("request: too long")


def test_a_request_that_the_engine_refuses_ends_on_all_ranks_alike() -> None:
    run_ranks(2, ask_for_too_long_an_answer)


def test_a_damaged_checkpoint_is_refused(base: Path, tasks: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(newest(base), checkpoint)
    flip_bit(min(checkpoint.glob("__*.distcp")), 4321)
    with pytest.raises(RefusedError):
        evaluate(checkpoint, ["colors"], None, options(tasks, tokenizer="byte"))
    with pytest.raises(UserError, match=r"names no tokenizer; give one with --tokenizer KIND:PATH"):
        evaluate(base, ["colors"], None, options(tasks))


class StopBefore(Hook):
    """Hook that sends SIGTERM to its own process after a step, before the evaluation that follows the step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_metrics(self, session: Any, line: dict[str, Any]) -> None:
        if line["step"] == self._step and session.ranks.is_main:
            os.kill(os.getpid(), signal.SIGTERM)


def train_with_and_without(run_file: str, common: Sequence[str], evaluation: str, folder: str) -> list[int]:
    """Train without evaluations, with them and an average, and with an interruption by a signal and a resume."""
    with_evaluation = [*common, evaluation, "ema.decay=0.5"]
    statuses = [
        train_here(run_file, [*common, f"output={folder}/without"]),
        train_here(run_file, [*with_evaluation, f"output={folder}/with"]),
    ]
    stopped = [*with_evaluation, f"output={folder}/stopped"]
    statuses.append(train_with_hooks(run_file, stopped, hooks=[StopBefore(3)]))
    statuses.append(train_here(run_file, stopped))
    return statuses


def test_training_with_evaluations_is_bit_equal_and_resumes(run_file: Path, tasks: Path, tmp_path: Path) -> None:
    """Evaluations are due after steps 0, 3, 4 (the switch) and 6 (the end); a stop after step 3 interrupts one."""
    evaluation = f"evaluation={{tasks: [colors, letters], every: 3, limit: 4, include_path: {tasks}}}"
    common = [
        *("tokenizer=byte", "tokens=1536", "phases.0.until={step: 4}"),
        *("model.attention_dropout=0.1", "checkpoint.every=5", "parallel.tensor=2", "log.tensorboard=true"),
    ]
    (statuses, _) = run_ranks(2, train_with_and_without, str(run_file), common, evaluation, str(tmp_path))
    assert statuses == [EXIT_OK, EXIT_OK, EXIT_STOPPED, EXIT_OK]
    lines = read_metrics(tmp_path / "with", "evaluation")
    assert [line["step"] for line in lines] == [0, 3, 4, 6]
    assert set(lines[0]["evaluation"]) == {"colors", "letters"}
    assert "bits_per_byte" in lines[0]["evaluation"]["letters"]
    assert lines[0]["tasks"] == lines[-1]["tasks"]
    assert set(lines[0]["tasks"]["colors"]) >= {"documents", "num_fewshot", "digest"}
    assert lines[0]["evaluation"]["letters"] != lines[-1]["evaluation"]["letters"]
    assert all(line["evaluation_seconds"] > 0 for line in lines)
    assert lines[0]["evaluation_ema"] == lines[0]["evaluation"], "the average starts as the weights"
    assert lines[-1]["evaluation_ema"]["letters"] != lines[-1]["evaluation"]["letters"]
    stopped = read_metrics(tmp_path / "stopped", "evaluation")
    for key in ("evaluation", "evaluation_ema"):
        assert [line[key] for line in stopped] == [line[key] for line in lines]
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("without", "with", "stopped")]
    assert losses[0] == losses[1] == losses[2]
    for name in ("with", "stopped"):
        assert differing(newest(tmp_path / "without"), newest(tmp_path / name), ignore=("optimizer.state.ema.",)) == []
    assert differing(newest(tmp_path / "with"), newest(tmp_path / "stopped")) == []


def test_an_evaluation_that_cannot_run_is_found_before_training(run_file: Path, tasks: Path, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", colors={"doc_to_text": "{{ {'grass': 'Grass'}[object] }}"})
    evaluation = f"evaluation={{tasks: [colors], include_path: {folder}}}"
    with pytest.raises(UserError, match="task colors: its prompts cannot be built"):
        train_here(str(run_file), ["tokenizer=byte", evaluation, f"output={tmp_path}/out"])
    assert not (tmp_path / "out" / "run.yaml").exists()


class NanUntilEvaluation(Hook):
    """Makes every weight NaN before the first evaluation, and restores it after."""

    def on_start(self, session: Any) -> None:
        self._weights = [parameter for chunk in session.model.chunks for parameter in chunk.parameters()]
        self._kept = [weight.detach().clone() for weight in self._weights]
        for weight in self._weights:
            weight.data.fill_(float("nan"))

    def on_evaluation(self, session: Any, line: dict[str, Any]) -> None:
        for weight, kept in zip(self._weights, self._kept, strict=True):
            weight.data.copy_(kept)


def train_with_nan_at_first(run_file: str, overrides: list[str]) -> int:
    return train_with_hooks(run_file, overrides, hooks=[NanUntilEvaluation()])


def test_an_evaluation_that_computes_nan_has_no_results_and_training_continues(
    run_file: Path, tasks: Path, tmp_path: Path
) -> None:
    overrides = [
        *("tokenizer=byte", "parallel.tensor=2", "stop_at_step=1", f"output={tmp_path}"),
        f"evaluation={{tasks: [colors, continue], at: [start], every: 1, limit: 2, include_path: {tasks}}}",
    ]
    assert run_ranks(2, train_with_nan_at_first, str(run_file), overrides) == [EXIT_OK] * 2
    first, last = (line["evaluation"] for line in read_metrics(tmp_path, "evaluation"))
    assert first == {}
    assert set(last) == {"colors", "continue"}
