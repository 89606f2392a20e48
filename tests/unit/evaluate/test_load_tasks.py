"""Task files: what is loaded, and what is refused or named instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval")

from megatron_cpt.errors import UserError
from megatron_cpt.evaluate.harness import LoadedTasks, TaskChoice
from tests.helpers.evaluation import write_tasks


def load(folder: Path, *names: str) -> LoadedTasks:
    return LoadedTasks(TaskChoice(names=names, include_path=str(folder), limit=2))


def write_group(folder: Path, name: str, *tasks: Any) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": list(tasks)}))


def test_a_task_may_be_asked_for_twice_with_the_same_settings(tmp_path: Path) -> None:
    write_group(write_tasks(tmp_path), "all", "colors", "letters")
    assert load(tmp_path, "all", "colors").names == ["colors", "letters"]


@pytest.mark.parametrize("names", [["few", "colors"], ["colors", "few"]])
def test_one_task_with_two_settings_is_refused(tmp_path: Path, names: list[str]) -> None:
    """Before, the group had the value of the task that came last."""
    write_group(write_tasks(tmp_path), "few", {"task": "colors", "num_fewshot": 2})
    with pytest.raises(UserError, match="task colors: asked for twice with different settings"):
        load(tmp_path, *names)


@pytest.mark.parametrize("kind", ["path", "group"])
def test_code_of_a_dataset_is_refused_wherever_it_is_asked_for(tmp_path: Path, kind: str) -> None:
    write_tasks(tmp_path / "hidden", colors={"dataset_kwargs": {"trust_remote_code": True, "data_files": "x.jsonl"}})
    path = tmp_path / "hidden" / "colors.yaml"
    task = yaml.safe_load(path.read_text())
    task["dataset_kwargs"]["data_files"] = {"test": str(tmp_path / "hidden" / "documents.jsonl")}
    path.write_text(yaml.safe_dump(task))
    (tmp_path / "groups").mkdir()
    write_group(tmp_path / "groups", "inline", {**task, "task": "inner"})
    with pytest.raises(UserError, match=r"asks to run code that comes with its dataset"):
        load(tmp_path / "groups", str(path) if kind == "path" else "inline")


def test_a_template_calls_no_python(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    template = f"{{{{ cycler.__init__.__globals__.os.mkdir('{proof}') }}}}"
    write_tasks(tmp_path / "tasks", colors={"doc_to_text": template})
    with pytest.raises(UserError, match=r"task colors: cannot be loaded \(SecurityError: access to attribute"):
        load(tmp_path / "tasks", "colors")
    assert not proof.exists()


def test_a_function_that_ends_the_process_is_an_error(tmp_path: Path) -> None:
    """Before: status 0 without a result."""
    write_tasks(tmp_path)
    (tmp_path / "leave.py").write_text("import sys\n\n\ndef leave(document):\n    sys.exit(0)\n")
    with (tmp_path / "colors.yaml").open("a") as file:
        file.write("process_docs: !function leave.leave\n")
    with pytest.raises(UserError, match=r"task colors: .*called sys\.exit"):
        load(tmp_path, "colors").check_prompts()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["b"], "b": ["a"]}, r"a\.yaml: the group a contains itself, by a > b"),
        ({"a": []}, "task a: a group without tasks"),
        ({"a": [7]}, r"a\.yaml: a group lists names of tasks, not 7; put it in quotes"),
        ({"a": ["colrs"]}, r"a\.yaml: lists colrs, which is not a known task, group or tag; did you mean colors\?"),
    ],
)
def test_a_group_that_makes_no_sense_is_one_message(tmp_path: Path, groups: Any, message: str) -> None:
    write_tasks(tmp_path)
    for name, tasks in groups.items():
        write_group(tmp_path, name, *tasks)
    with pytest.raises(UserError, match=message):
        load(tmp_path, "a")


def test_documents_that_are_no_json_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before: "An error occurred while generating the dataset", and a second message of `datasets`."""
    (write_tasks(tmp_path) / "documents.jsonl").write_text('{"object": "gra')
    with pytest.raises(UserError, match=r"task colors: cannot be loaded \((JSONDecodeError|ValueError|ArrowInvalid)"):
        load(tmp_path, "colors")
    assert "Failed to" not in caplog.text


def test_files_that_the_harness_skips_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tasks(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: [broken\n")
    (tmp_path / "second.yaml").write_text((tmp_path / "colors.yaml").read_text())
    (tmp_path / "run.yaml").write_text("name: run\noutput: runs/run\n")
    load(tmp_path, "colors")
    assert f"task files: Skip {tmp_path / 'broken.yaml'}" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert not any("run.yaml" in text for text in warnings), "before, a line for each run.yaml in the folder"
    assert "task files: Duplicate task name 'colors' found" in caplog.text


@pytest.mark.parametrize("wanted", ["colors", "2024"])
def test_a_name_that_is_a_number_is_refused_with_its_file(tmp_path: Path, wanted: str) -> None:
    write_tasks(tmp_path)
    (tmp_path / "year.yaml").write_text("task: 2024\ndataset_path: json\n")
    with pytest.raises(UserError, match=r"year\.yaml: the name of a task is text, not 2024; put it in quotes"):
        load(tmp_path, wanted)


def test_an_unknown_task_names_some_of_the_skipped_files(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    for number in range(8):
        (tmp_path / f"other{number}.yaml").write_text("tsk: mine\n")
    with pytest.raises(UserError, match=r"other4\.yaml \(Unknown config shape: .*\n  and 3 more files"):
        load(tmp_path, "mine")


def test_a_tag_that_is_a_number_names_a_task_that_has_it(tmp_path: Path) -> None:
    write_tasks(tmp_path, colors={"tag": ["fine", 3]})
    with pytest.raises(UserError, match=r"task colors: a tag is text, not 3; put it in quotes"):
        load(tmp_path, "letters")


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    write_tasks(tmp_path, colors={"task": "colors[1]"})
    assert load(tmp_path, "colors[1]").names == ["colors[1]"]


def test_a_name_with_brackets_asks_for_code_in_vain(tmp_path: Path) -> None:
    """Before, its file was not looked at."""
    path = str(write_tasks(tmp_path) / "documents.jsonl")
    keys = {"trust_remote_code": True, "data_files": {"test": path}}
    write_tasks(tmp_path, colors={"task": "colors[1]", "dataset_kwargs": keys})
    with pytest.raises(UserError, match="asks to run code that comes with its dataset"):
        load(tmp_path, "colors[1]")
