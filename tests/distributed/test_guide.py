"""Every command of the guide runs, in the order of the pages, in one empty directory."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command import run_command
from tests.helpers.guide import GuideCommand, GuideFile, guide_steps

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "docs" / "guide"
# The order of mkdocs.yml: later pages use the files and runs of getting-started.md.
PAGES = (
    "getting-started",
    "run-yaml",
    "data",
    "mine",
    "phases",
    "convert",
    "train",
    "distill",
    "evaluate",
    "evaluate-tasks",
    "report",
    "plan",
    "law",
    "experiment",
    "recipe",
    "average",
    "grow",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guide")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment with `megatron-cpt` and `python` on the path, whether or not the package is installed."""
    programs = tmp_path_factory.mktemp("bin")
    for name, arguments in (("megatron-cpt", "-m megatron_cpt "), ("python", "")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        script.chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **path}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_guide_runs(page: str, folder: Path, environment: dict[str, str]) -> None:
    for step in guide_steps(GUIDE / f"{page}.md"):
        if isinstance(step, GuideFile):
            (folder / step.name).write_text(step.content)
        elif step.skip_reason is None:
            done = _run(step.text, folder, environment)
            assert done.returncode == step.status, f"$ {step.text}\n{done.stdout}\n{done.stderr}"


def _run(text: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a line in bash; a `megatron-cpt` that needs neither a shell nor a launcher is forked, which saves imports."""
    words = shlex.split(text)
    if words[:1] == ["megatron-cpt"] and words[1] not in ("--version", "launch") and not set(text) & set("*>|;$"):
        return run_command(words[1:], folder=folder, environment=environment)
    command = ["bash", "-c", text]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_every_page_of_the_guide_is_run() -> None:
    assert sorted(PAGES) == sorted(path.stem for path in GUIDE.glob("*.md"))


def test_commands_that_are_not_run_say_why() -> None:
    commands = [step for page in PAGES for step in guide_steps(GUIDE / f"{page}.md") if isinstance(step, GuideCommand)]
    skipped = [(command.text.split()[1], command.skip_reason) for command in commands if command.skip_reason]
    assert skipped == [
        ("tools/static_embedder.py", "downloads 83 MB, and distills for minutes"),
        *[("mine", "needs the model of the first command")] * 5,
        *[(command, "needs a downloaded model") for command in ("convert", "convert", "preprocess")],
        ("launch", "needs 8 GPUs"),
        *[(command, "the teacher reads all of a source") for command in ("teach", "train")],
        ("launch", "needs 4 processes"),
        ("launch", "needs a checkpoint of a size that is worth splitting"),
        ("-m", "downloads 70 MB"),
        ("evaluate", "downloads 70 MB"),
        ("evaluate", "generates 164 programs"),
        ("python", "takes hours on two cores"),
        ("report", "serves until Ctrl-C"),
        ("fit", "needs ten finished runs"),
        ("fit", "needs a finished experiment"),
        ("plan", "needs a fit"),
        ("experiment", "trains six runs"),
        ("experiment", "needs SLURM"),
        ("runs/rates/experiment.sbatch", "needs SLURM"),
        ("experiment", "needs Ray"),
        *[(command, "needs an embedding model") for command in ("mine", "recipe")],
        ("average", "needs the tasks of the evaluation page"),
    ]
    assert len(commands) - len(skipped) >= 25
