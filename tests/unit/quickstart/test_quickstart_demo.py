"""The story's own logic; the commands it calls have tests of their own."""

import io
import os
import sys

import demo
import orjson
import pytest
from rich.console import Console
from sources import HELD_OUT, PRETRAINING, QUESTIONS
from story import StepError


class Recorder(demo.Story):
    """Notes the commands instead of running them; `preprocess` leaves an index."""

    def __init__(self):
        super().__init__(Console(file=io.StringIO()))
        self.commands = []

    def run(self, command):
        self.commands.append(list(command))
        if "preprocess" in command:
            prefix = command[command.index("--output-prefix") + 1]
            for ending in ("bin", "idx"):
                open(f"{prefix}.{ending}", "xb").close()  # refuses to overwrite, as the command does


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, names in (("train", [*PRETRAINING, *QUESTIONS]), ("heldout", HELD_OUT)):
        (demo.DATA / "text" / split).mkdir(parents=True)
        for name in names:
            (demo.DATA / "text" / split / f"{name}.jsonl").write_text("")
    (demo.DATA / "tokenizer.model").write_text("")
    for path in demo.DATA.rglob("*"):
        os.utime(path, (1, 1))


@pytest.mark.usefixtures("prepared")
def test_every_source_is_preprocessed_once():
    story = Recorder()
    demo.preprocess(story)
    assert len(story.commands) == len(PRETRAINING) + len(QUESTIONS) + len(HELD_OUT)
    story.commands.clear()
    demo.preprocess(story)
    assert story.commands == []


@pytest.mark.usefixtures("prepared")
def test_new_text_is_preprocessed_again():
    story = Recorder()
    demo.preprocess(story)
    story.commands.clear()
    newer = (demo.DATA / "train" / "web.idx").stat().st_mtime + 1
    os.utime(demo.DATA / "text" / "train" / "web.jsonl", (newer, newer))
    demo.preprocess(story)
    assert [command[command.index("--output-prefix") + 1] for command in story.commands] == [
        str(demo.DATA / "train" / "web")
    ]


def test_training_is_launched_on_two_ranks():
    story = Recorder()
    demo.train(story, "recipe")
    (command,) = story.commands
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert command == [sys.executable, *launcher, "-m", "megatron_cpt", "train", "examples/quickstart/recipe.yaml"]


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_failing_command_ends_the_demo_with_its_status(code, status):
    story = demo.Story(Console(file=io.StringIO()))
    with pytest.raises(StepError, match=f"status {status}") as caught:
        story.run([sys.executable, "-c", code])
    assert caught.value.exit_status == status


def test_commands_are_shown_as_one_types_them():
    story = demo.Story(Console(file=io.StringIO(), width=200))
    with pytest.raises(StepError):
        story.run([*demo.MEGATRON_CPT, "no-such-command", "a b"])
    assert story.console.file.getvalue() == "$ megatron-cpt no-such-command 'a b'\n"


def test_each_step_is_timed():
    story = demo.Story(Console(file=io.StringIO()))
    with story.step("First"):
        pass
    with story.step("Second"):
        pass
    assert list(story.seconds) == ["First", "Second"]
    assert "2. Second" in story.console.file.getvalue()


def test_report_of_three_finished_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, after in (("base", 5.0), ("baseline", 4.5), ("recipe", 4.0)):
        folder = demo.RUNS / name
        folder.mkdir(parents=True)
        lines = [
            {"step": 0, "validation": dict.fromkeys(HELD_OUT, 5.0)},
            {"step": 2, "tokens": 8192, "phase": "all", "lr": 1e-3, "loss": 5.0, "samples_by_source": {"web": 32}},
            {"step": 2, "validation": dict.fromkeys(HELD_OUT, after)},
        ]
        (folder / "metrics.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
        (folder / "plan.json").write_bytes(orjson.dumps({"phases": [{"name": "all", "last_step": 2}]}))
    story = demo.Story(Console(file=io.StringIO(), width=120))
    demo.report(story)
    record = orjson.loads((demo.RUNS / "results.json").read_bytes())
    assert [row["domain"] for row in record["held_out_loss"]] == [
        *("c4", "oscar", "owt", "wiki", "github", "mean of general text", "boolq", "exams", "mean of questions")
    ]
    assert {(row["before"], row["baseline"], row["recipe"]) for row in record["held_out_loss"]} == {(5.0, 4.5, 4.0)}
    assert (demo.RUNS / "quickstart.png").stat().st_size > 10_000
    assert "-0.500" in story.console.file.getvalue()
