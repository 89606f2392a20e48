"""The model of lm-evaluation-harness gives what the harness's own `hf` backend gives, and keeps finished requests."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.errors import EXIT_FAILURE, CptError, UserError
from megatron_cpt.evaluate.finished_requests import FinishedRequests
from megatron_cpt.evaluate.harness import HarnessResults, LoadedTasks, TaskChoice, metric_values
from megatron_cpt.evaluate.harness_context import ratio_error
from megatron_cpt.evaluate.lm_eval_model import HarnessModel
from megatron_cpt.evaluate.ranks import LeadingEngine, StopTexts
from tests.helpers.evaluation import TASKS, ArithmeticEngine, TransformersEngine, save_model_with_tokenizer, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("plain"))


def choose(tasks: Path, names: Any = TASKS, **options: Any) -> TaskChoice:
    return TaskChoice(names=names, include_path=str(tasks), **options)


def adapter(folder: Path, engine: ArithmeticEngine, **options: Any) -> HarnessModel:
    tokenizer = load_tokenizer(f"huggingface:{folder}")
    return HarnessModel(LeadingEngine(engine, tokenizer, 1), tokenizer, **options)


def run(folder: Path, tasks: Path) -> HarnessResults:
    return LoadedTasks(choose(tasks)).run(adapter(folder, ArithmeticEngine()), bootstrap=100)


def answers(results: HarnessResults) -> dict[str, list[Any]]:
    return {name: [sample["resps"] for sample in samples] for name, samples in results.samples.items()}


@pytest.mark.parametrize(("template", "num_fewshot"), [("", 2), ("<s> $A", 0)])
def test_equals_the_hf_backend(tmp_path: Path, tasks: Path, template: str, num_fewshot: int) -> None:
    """Few-shot prompts and long letters are longer than the model's 64 tokens, so both truncate."""
    from lm_eval.models.huggingface import HFLM

    folder = save_model_with_tokenizer(tmp_path, template=template)
    loaded = LoadedTasks(choose(tasks, num_fewshot=num_fewshot))
    ours = adapter(folder, TransformersEngine(folder))
    found = loaded.run(ours, with_samples=True, bootstrap=100)
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3, max_length=64)
    expected = loaded.run(theirs, with_samples=True, bootstrap=100)
    assert (ours.counts.truncated > 0) == (num_fewshot > 0)
    for name in TASKS:
        for one, other in zip(found.samples[name], expected.samples[name], strict=True):
            assert one["arguments"] == other["arguments"]
            if name == "colors":
                assert one["filtered_resps"] == [pytest.approx(answer, abs=1e-4) for answer in other["filtered_resps"]]
            elif name == "letters":
                assert one["filtered_resps"] == pytest.approx(other["filtered_resps"], abs=1e-3)
            else:
                assert one["resps"] == other["resps"]
    for name, metrics in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(metrics, abs=1e-4, rel=1e-5), name


def test_names_of_metrics_are_the_harness_s(plain_model: Path, tasks: Path) -> None:
    found = run(plain_model, tasks)
    assert set(found.metrics["colors"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert {"exact_match", "exact_match,first-word"} <= set(found.metrics["continue"])
    assert "bits_per_byte" in found.metrics["letters"]
    assert found.tasks["colors"]["documents"] == 8
    assert metric_values({"alias": "x", "sample_len": 8, "acc,none": 0.5, "acc_stderr,none": "N/A"}) == {"acc": 0.5}


def test_whole_texts_have_a_standard_error_and_no_examples(plain_model: Path, tasks: Path) -> None:
    """The harness has no standard error for them, and names the few-shot examples that were asked for."""
    model = adapter(plain_model, ArithmeticEngine())
    found = LoadedTasks(choose(tasks, ["letters"], num_fewshot=2)).run(model, with_samples=True, bootstrap=100)
    pairs = [sample["bits_per_byte"] for sample in found.samples["letters"]]
    assert found.metrics["letters"]["bits_per_byte_stderr"] == pytest.approx(ratio_error(pairs) / math.log(2))
    assert found.metrics["letters"]["word_perplexity_stderr"] > 0
    assert found.tasks["letters"]["num_fewshot"] == 0


def test_the_error_of_a_ratio_equals_the_bootstrap() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.lognormal(7, 0.8, 200)
    pairs = np.stack([-lengths * generator.normal(0.7, 0.1, 200), lengths], axis=1)
    draws = pairs[generator.integers(200, size=(4000, 200))].sum(axis=1)
    assert ratio_error(pairs.tolist()) == pytest.approx(np.std(draws[:, 0] / draws[:, 1]), rel=0.05)


def test_an_interrupted_evaluation_computes_at_most_one_batch_twice(
    plain_model: Path, tasks: Path, tmp_path: Path
) -> None:
    path, loaded = tmp_path / "finished.sqlite", LoadedTasks(choose(tasks))
    undisturbed = ArithmeticEngine()
    expected = loaded.run(adapter(plain_model, undisturbed), with_samples=True, bootstrap=100)

    killed = ArithmeticEngine()
    killed.fail_after = round(undisturbed.computed * 0.6)
    with pytest.raises(KeyboardInterrupt):
        loaded.run(adapter(plain_model, killed, finished=FinishedRequests(path)), bootstrap=100)
    resumed = ArithmeticEngine()
    found = loaded.run(adapter(plain_model, resumed, finished=FinishedRequests(path)), with_samples=True, bootstrap=100)
    assert answers(found) == answers(expected)
    assert found.metrics == expected.metrics
    assert killed.computed + resumed.computed <= undisturbed.computed + 2, "a batch has two requests"

    again = ArithmeticEngine()
    model = adapter(plain_model, again, finished=FinishedRequests(path))
    assert loaded.run(model, bootstrap=100).metrics == expected.metrics
    assert again.computed == 0
    assert model.counts.answered_from_file == model.counts.total
    other = ArithmeticEngine()
    loaded.run(adapter(plain_model, other, finished=FinishedRequests(path), scope="other weights"), bootstrap=100)
    assert other.computed == undisturbed.computed


def test_progress_counts_every_request_once(plain_model: Path, tasks: Path) -> None:
    calls: list[tuple[int, int]] = []
    model = adapter(plain_model, ArithmeticEngine(), advance=lambda *call: calls.append(call))
    LoadedTasks(choose(tasks)).run(model, bootstrap=100)
    assert sum(amount for amount, _ in calls) == calls[-1][1] == model.counts.total


def test_an_evaluation_leaves_random_states_unchanged(plain_model: Path, tasks: Path) -> None:
    import random

    import numpy as np
    import torch

    def states() -> Iterator[Any]:
        yield from (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())

    before = list(states())
    run(plain_model, tasks)
    assert list(states()) == before


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"colors": {"dataset_kwargs": {"trust_remote_code": True}}}, ["colors"], "code that comes with its dataset"),
        ({"colors": {"unsafe_code": True}}, ["colors"], r"task colors: runs programs .* --allow-code-execution"),
        ({"colors": {"dataset_path": "someone/colors"}}, ["colors"], "--online:\n  colors: Couldn.t reach"),
        ({"colors": {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}}, ["colors"], "colors: cannot be loaded"),
        ({"colors": {"metric_list": [{"metric": "accuracy_of_nobody"}]}}, ["colors"], "task colors: cannot be loaded"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_run_is_one_message(tmp_path: Path, changes: Any, names: Any, message: str) -> None:
    write_tasks(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        LoadedTasks(choose(tmp_path, names))


class BrokenEngine(ArithmeticEngine):
    def score(self, requests: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA out of memory")


def test_an_error_of_the_engine_is_no_fault_of_the_task(plain_model: Path, tasks: Path) -> None:
    """Before: status 2 and "correct the task's file or its data"."""
    model, loaded = adapter(plain_model, BrokenEngine()), LoadedTasks(choose(tasks))
    with pytest.raises(RuntimeError, match="CUDA out of memory") as caught:
        model._engine.lead(lambda: loaded.run(model, bootstrap=100))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_failing_disk_is_no_fault_of_the_task(tasks: Path, monkeypatch: Any, is_wrapped: bool) -> None:
    import datasets

    def load_dataset(**_: Any) -> None:
        error = OSError(errno.EIO, "Input/output error", "colors.jsonl")
        if not is_wrapped:
            raise error
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CptError, match=r"task colors: cannot be loaded: colors.jsonl: Input/output error") as caught:
        LoadedTasks(choose(tasks, ["colors"]))
    assert caught.value.exit_status == EXIT_FAILURE


@pytest.mark.long
def test_an_unknown_task_names_the_nearest_one(tasks: Path) -> None:
    """Reads the harness's 14,000 task files."""
    with pytest.raises(UserError, match=r"task color: not a known task, group or tag; did you mean colors\?"):
        LoadedTasks(choose(tasks, ["color"]))


def test_a_broken_prompt_is_found_before_a_run(tmp_path: Path) -> None:
    write_tasks(tmp_path, colors={"doc_to_text": "{{ {'grass': 'Grass'}[object] }}"})
    with pytest.raises(UserError, match="task colors: its prompts cannot be built"):
        LoadedTasks(choose(tmp_path, ["colors"])).check_prompts()


def test_a_missing_folder_of_tasks_is_named() -> None:
    with pytest.raises(UserError, match="include_path: none: no such folder"):
        LoadedTasks(TaskChoice(names=["colors"], include_path="none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 64}, "leaves no room for a prompt in the model's 64 tokens"),
        ({"num_beams": 4}, "generation_kwargs: num_beams not supported"),
        ({"max_gen_toks": 0}, "generation_kwargs: max_gen_toks: 0; give 1 or more"),
        ({"do_sample": True, "temperature": -1.0}, "generation_kwargs: temperature: -1.0; give 0"),
        ({"do_sample": True, "temperature": 1.0, "top_p": math.nan}, "generation_kwargs: top_p: nan; give a prob"),
    ],
)
def test_generation_that_is_not_possible_is_named(
    plain_model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_tasks(tmp_path, **{"continue": {"generation_kwargs": {"until": ["\n"], **options}}})
    model = adapter(plain_model, ArithmeticEngine())
    with pytest.raises(UserError, match=message):
        LoadedTasks(choose(tmp_path, ["continue"])).run(model, bootstrap=100)


def test_a_stop_text_may_be_spread_over_tokens() -> None:
    stop = StopTexts(["\n\nQ", ""], lambda ids: bytes(ids).decode(errors="replace"))
    ids = tuple(b"a long answer\n\nQ")
    assert [stop(0, ids[:length]) for length in range(len(ids) - 2, len(ids) + 1)] == [False, False, True]
