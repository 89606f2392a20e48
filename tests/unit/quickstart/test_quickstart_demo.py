"""Logic of the demo itself; the commands it calls have their own tests."""

import io
import os
import sys

import demo
import orjson
import pytest
from rich.console import Console
from sources import HELD_OUT, PRETRAINING, QUESTIONS
from walkthrough import StepError


class Recorder(demo.Walkthrough):
    """Record commands instead of running them; `preprocess` leaves an index."""

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
    walkthrough = Recorder()
    demo.preprocess(walkthrough)
    assert len(walkthrough.commands) == len(PRETRAINING) + len(QUESTIONS) + len(HELD_OUT)
    walkthrough.commands.clear()
    demo.preprocess(walkthrough)
    assert walkthrough.commands == []


@pytest.mark.usefixtures("prepared")
def test_new_text_is_preprocessed_again():
    walkthrough = Recorder()
    demo.preprocess(walkthrough)
    walkthrough.commands.clear()
    newer = (demo.DATA / "train" / "web.idx").stat().st_mtime + 1
    os.utime(demo.DATA / "text" / "train" / "web.jsonl", (newer, newer))
    demo.preprocess(walkthrough)
    assert [command[command.index("--output-prefix") + 1] for command in walkthrough.commands] == [
        str(demo.DATA / "train" / "web")
    ]


def test_training_is_launched_on_two_ranks():
    walkthrough = Recorder()
    demo.train(walkthrough, "recipe")
    (command,) = walkthrough.commands
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert command == [sys.executable, *launcher, "-m", "megatron_cpt", "train", "examples/quickstart/recipe.yaml"]


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_failing_command_ends_the_demo_with_its_status(code, status):
    walkthrough = demo.Walkthrough(Console(file=io.StringIO()))
    with pytest.raises(StepError, match=f"status {status}") as caught:
        walkthrough.run([sys.executable, "-c", code])
    assert caught.value.exit_status == status


def test_commands_are_shown_as_one_types_them():
    walkthrough = demo.Walkthrough(Console(file=io.StringIO(), width=200))
    with pytest.raises(StepError):
        walkthrough.run([*demo.MEGATRON_CPT, "no-such-command", "a b"])
    assert walkthrough.console.file.getvalue() == "$ megatron-cpt no-such-command 'a b'\n"


def test_each_step_is_timed():
    walkthrough = demo.Walkthrough(Console(file=io.StringIO()))
    with walkthrough.step("First"):
        pass
    with walkthrough.step("Second"):
        pass
    assert list(walkthrough.seconds) == ["First", "Second"]
    assert "2. Second" in walkthrough.console.file.getvalue()


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
    walkthrough = demo.Walkthrough(Console(file=io.StringIO(), width=120))
    demo.report(walkthrough)
    record = orjson.loads((demo.RUNS / "results.json").read_bytes())
    assert [row["domain"] for row in record["held_out_loss"]] == [
        *("c4", "oscar", "owt", "wiki", "github", "mean of general text", "boolq", "exams", "mean of questions")
    ]
    assert {(row["before"], row["baseline"], row["recipe"]) for row in record["held_out_loss"]} == {(5.0, 4.5, 4.0)}
    assert (demo.RUNS / "quickstart.png").stat().st_size > 10_000
    assert "compared with baseline" in (demo.RUNS / "report.html").read_text()
    assert f"Report: open {tmp_path}/runs/quickstart/report.html" in walkthrough.console.file.getvalue()
    assert "-0.500" in walkthrough.console.file.getvalue()
