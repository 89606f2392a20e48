"""The offline tasks as lm-evaluation-harness loads them: prompts letter by letter, and a whole evaluation."""

import math
import os
import re

import pytest

pytest.importorskip("lm_eval")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no pool of forked processes for the bootstrap

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from megatron_cpt.errors import EXIT_USER, UserError
from megatron_cpt.evaluate.harness import LoadedTasks, TaskChoice
from megatron_cpt.evaluate.offline import VARIABLE
from megatron_cpt.evaluate.offline.question_rows import EXAMS, HELDOUT, MULTIPLE_CHOICE
from megatron_cpt.evaluate.offline.task_files import PAPER, PAPER_OWN, all_groups, all_tasks
from megatron_cpt.evaluate.programs.code_execution import allow_code_execution


class ByteModel(LM):
    """Every byte of a text has a probability of 1/4, and an answer is always "4 apples" or a right program."""

    def tok_encode(self, string, add_special_tokens=True):
        return list(string.encode())

    def loglikelihood(self, requests):
        return [(-2 * math.log(2) * len(request.args[1].encode()), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [-2 * math.log(2) * len(request.args[0].encode()) for request in requests]

    def generate_until(self, requests):
        return ["    return 2" if "def two" in request.args[0] else " 4000 apples" for request in requests]


@pytest.fixture(scope="module")
def manager(tasks):
    return TaskManager(include_path=str(tasks), include_defaults=False)


def requests(manager, name):
    task = manager.load([name])["tasks"][name]
    task.build_all_requests(limit=1)
    return [instance.args for instance in task.instances]


def last(context):
    """The evaluated question, without the examples before it."""
    return context.split("\n\n")[-1]


def test_cloze_prompt(manager):
    first, *others = requests(manager, "piqa_cloze")
    shown = first[0].split("\n\n")
    assert len(shown) == 6
    assert all(example.startswith("Goal: Q") and "?\nAnswer: choice " in example for example in shown[:5])
    number = last(first[0]).removeprefix("Goal: Q").removesuffix("?\nAnswer:")
    assert [first[1], *(answer for _, answer in others)] == [f" choice A{number}", f" choice B{number}"]


def test_letters_prompt(manager):
    arguments = requests(manager, "piqa_mc")
    context = last(arguments[0][0])
    number = context.partition("?")[0].removeprefix("Goal: Q")
    assert context == f"Goal: Q{number}?\n A. choice A{number}\n B. choice B{number}\nAnswer:"
    assert [answer for _, answer in arguments] == [" A", " B"]
    examples = arguments[0][0].split("\n\n")[:-1]
    assert all(example[-len("Answer: A") :] in ("Answer: A", "Answer: B") for example in examples)


@pytest.mark.parametrize(
    ("name", "start", "num_choices"),
    [
        ("mmlu", "Question: Q{n}?", 4),
        ("openbookqa", "Question: Q{n}?", 4),
        ("commonsenseqa", "Question: Q{n}?", 5),
        ("siqa", "Question: P{n}. Q{n}?", 3),
        ("logiqa", "Passage: P{n}.\nQuestion: Q{n}?", 4),
        ("exams_french", "Question: Q{n}?", 3),
    ],
)
def test_questions_of_each_dataset(manager, name, start, num_choices):
    (letters, _), *_ = arguments = requests(manager, f"{name}_mc")
    assert [answer for _, answer in arguments] == [f" {letter}" for letter in "ABCDE"[:num_choices]]
    number = last(letters).partition("?")[0][-1]
    options = "".join(f"\n {letter}. choice {letter}{number}" for letter in "ABCDE"[:num_choices])
    assert last(letters) == f"{start.format(n=number)}{options}\nAnswer:"
    (cloze, _), *_ = requests(manager, f"{name}_cloze")
    assert last(cloze) == f"{start.format(n=number)}\nAnswer:"


def test_boolq_prompt(manager):
    (context, yes), (_, no) = requests(manager, "boolq_cloze")
    assert (yes, no) == (" yes", " no")
    assert last(context) == "Held out\nQuestion: is it held out?\nAnswer:"
    (context, _), _ = requests(manager, "boolq_mc")
    assert last(context) == "Held out\nQuestion: is it held out?\n A. yes\n B. no\nAnswer:"


def test_truthfulqa_rates_every_correct_answer(manager):
    arguments = requests(manager, "truthfulqa_cloze")
    number = last(arguments[0][0]).removeprefix("Question: Q").removesuffix("?\nAnswer:")
    assert [answer for _, answer in arguments] == [f" True {number}", f" Right {number}"]


def test_asdiv_prompt(manager):
    ((context, options),) = requests(manager, "asdiv_gen")
    examples = context.split("\n\n")
    number = examples[-1].removeprefix("Question: P")[0]
    assert examples[-1] == f"Question: P{number}. How many?\nAnswer:"
    assert all(example.endswith(",000 apples") for example in examples[:-1])
    assert options == {"until": ["\n"], "max_gen_toks": 32, "do_sample": False}


def test_humaneval_prompts(manager):
    ((context, body),) = requests(manager, "humaneval_cloze")
    assert (context, body) == ("def two():\n    # 1 + 1", "\n    return 2\n")
    ((prompt, options),) = requests(manager, "humaneval_gen")
    assert prompt == "def two():\n    # 1 + 1\n"
    assert options["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]


def test_heldout_text_is_rated_as_it_is(manager):
    assert requests(manager, "heldout_wiki") == [("Text of wikipedia.",)]


def test_only_the_task_that_runs_programs_needs_permission(manager):
    loaded = manager.load([config["task"] for config in all_tasks()])["tasks"]
    assert [name for name, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)] == ["humaneval_gen"]
    offline = manager.load(["offline"])
    assert loaded.keys() - offline["tasks"].keys() == {"humaneval_gen"}
    assert len(offline["tasks"]) == 2 * len(MULTIPLE_CHOICE) + 2 * len(EXAMS) + len(HELDOUT) + 4


@pytest.mark.long  # the harness reads 14,000 files
def test_no_name_hides_one_of_the_harness():
    ours = {config["task"] for config in all_tasks()} | {config["group"] for config in all_groups()}
    theirs = TaskManager()
    assert ours.isdisjoint(theirs.all_tasks)
    assert set(PAPER) - set(PAPER_OWN) <= set(theirs.all_tasks)
    assert set(PAPER_OWN) <= ours


def test_an_evaluation_of_everything(manager):
    with allow_code_execution():
        found = evaluate(
            ByteModel(), manager.load(["offline", "humaneval_gen"]), bootstrap_iters=10, confirm_run_unsafe_code=True
        )["results"]
    for name in ("heldout_c4", "heldout"):
        assert found[name]["bits_per_byte,none"] == pytest.approx(2.0)
    # The blank before an answer costs 2 bits too, but is no byte of it: " choice A0" is 2 * 10 bits over 9 bytes.
    assert found["mmlu_cloze"]["bits_per_byte,none"] == pytest.approx(20 / 9)
    assert found["mmlu_mc"]["bits_per_byte,none"] == pytest.approx(4.0)
    assert found["humaneval_cloze"]["bits_per_byte,none"] == pytest.approx(2.0)
    assert found["humaneval_gen"]["pass@1,none"] == 1.0
    assert found["exams_cloze"]["bits_per_byte,none"] == pytest.approx(20 / 9)
    # All choices are equally long, so the first one is chosen everywhere.
    golds = manager.load(["mmlu_mc"])["tasks"]["mmlu_mc"].eval_docs["gold"]
    assert found["mmlu_mc"]["acc,none"] == pytest.approx(sum(gold == 0 for gold in golds) / len(golds))
    assert found["asdiv_gen"]["exact_match,none"] in (0.0, pytest.approx(1 / 3))
    assert "acc_mutual_info,none" in found["openbookqa_cloze"]
    assert "acc_mutual_info,none" not in found["piqa_cloze"]


@pytest.fixture
def built(monkeypatch, tasks):
    monkeypatch.setenv(VARIABLE, str(tasks))


def test_built_tasks_need_no_include_path(built):
    found = LoadedTasks(TaskChoice(names=["piqa_cloze", "exams_*_mc"])).run(ByteModel(), bootstrap=0)
    assert len(found.tasks) == 1 + len(EXAMS)
    assert found.metrics["piqa_cloze"]["bits_per_byte"] == pytest.approx(20 / 9)
    assert "acc_tokens" in found.metrics["piqa_cloze"]


def test_programs_are_refused_before_anything_is_computed(built):
    with pytest.raises(UserError, match=r"task humaneval_gen: .*--allow-code-execution") as caught:
        LoadedTasks(TaskChoice(names=["piqa_cloze", "humaneval_gen"]))
    assert caught.value.exit_status == EXIT_USER
    allowed = LoadedTasks(TaskChoice(names=["humaneval_gen"], allow_code_execution=True))
    assert allowed.run(ByteModel(), bootstrap=0).metrics["humaneval_gen"]["pass@1"] == 1.0


@pytest.mark.long  # the harness reads 14,000 files
def test_the_paper_s_group_says_what_is_missing(built, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"tasks: the data is not on this machine") as caught:
        LoadedTasks(TaskChoice(names=["paper", "arc_easy"], allow_code_execution=True))
    assert caught.value.exit_status == EXIT_USER
    for line in (r"mmlu_.* and 56 more: .*cais/mmlu", r"hellaswag: .*hellaswag", r"mgsm_.* and 2 more: ", "arc_easy: "):
        assert re.search(f"\n  {line}", str(caught.value))


@pytest.mark.long  # the harness reads 14,000 files
def test_tasks_that_were_not_built_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"`python -m megatron_cpt\.evaluate\.offline` builds the offline tasks"):
        LoadedTasks(TaskChoice(names=["offline"]))
