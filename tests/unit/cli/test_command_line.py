"""The command line as a whole: grouped help, shell completion, packages that are not installed, imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt import errors
from megatron_cpt.cli import app, main
from megatron_cpt.cli.command_groups import GROUPS
from megatron_cpt.errors import install_command

_WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # the import system then behaves as if the package were not installed
from megatron_cpt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _complete(line: str) -> list[str]:
    words = line.split(" ")
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_MEGATRON_CPT_COMPLETE": "complete_bash"}
    done = _run("-m", "megatron_cpt", **environment)
    assert done.stderr == ""
    return done.stdout.split()


def test_help_groups_the_commands_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    sections = dict(part.split(":\n", 1) for part in out.split("\n\n") if ":\n" in part)
    assert [title for title in sections if title in GROUPS] == list(GROUPS)
    assert "Other" not in sections
    listed = {line.split()[0] for title in GROUPS for line in sections[title].splitlines() if line[2:3].strip()}
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert listed == names | {"convert"}


def test_brackets_in_messages_stay_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "runs/[red]/run.yaml"]) == 2
    assert "runs/[red]/run.yaml" in capsys.readouterr().err


def test_bash_completes_commands_options_and_choices() -> None:
    assert _complete("megatron-cpt pl") == ["plan"]
    assert _complete("megatron-cpt plan --adv") == ["--advise"]
    assert _complete("megatron-cpt convert im") == ["import"]
    assert _complete("megatron-cpt convert export --dtype b") == ["bf16"]


def test_bash_gets_a_script() -> None:
    done = _run("-m", "megatron_cpt", _MEGATRON_CPT_COMPLETE="source_bash")
    assert done.returncode == 0, done.stderr
    assert "complete -o default -F _megatron_cpt_completion megatron-cpt" in done.stdout


@pytest.mark.parametrize(
    ("missing", "words", "message"),
    [
        ("torch", "train run.yaml", f"megatron-cpt train: torch is not installed; {install_command('train')}"),
        (
            "torch",
            "launch --nproc-per-node 2 -- train run.yaml",
            f"megatron-cpt launch: torch is not installed; {install_command('train')}",
        ),
        (
            "zstandard",
            "preprocess --input a.jsonl --output-prefix p --tokenizer byte",
            f"megatron-cpt preprocess: zstandard is not installed; {install_command('data')}",
        ),
        (
            "faiss",
            "mine --queries q.jsonl --corpus web --output mined --embedder model2vec:static",
            f"megatron-cpt mine: faiss is not installed; {install_command('mine')}",
        ),
    ],
)
def test_a_missing_package_is_one_message(missing: str, words: str, message: str) -> None:
    done = _run("-c", _WITHOUT, missing, *words.split())
    assert (done.returncode, done.stderr.strip()) == (2, message)


def test_doctor_reports_a_missing_torch() -> None:
    done = _run("-c", _WITHOUT, "torch", "doctor")
    assert done.returncode == 1, done.stderr
    assert f"pip install -e '{Path(__file__).parents[3]}[train]'" in done.stdout


def test_without_a_checkout_the_command_says_where_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_CHECKOUT", tmp_path)
    assert install_command("hf") == "pip install '.[hf]' in the folder of megatron-cpt's setup.py"


def test_help_and_import_load_nothing_heavy() -> None:
    code = "import sys, megatron_cpt.__main__; print(*sys.modules)"
    loaded = _run("-c", code).stdout.split()
    assert "megatron_cpt.cli" in loaded
    assert not {"torch", "numpy", "pydantic", "rich"} & set(loaded)
