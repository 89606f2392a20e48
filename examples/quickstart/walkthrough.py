"""Run an example as numbered, timed steps; each command is printed before it runs."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table

from megatron_cpt.cli.tool import run_tool
from megatron_cpt.errors import CptError

ROOT = Path(__file__).resolve().parents[2]  # paths in the run.yaml files are relative to it
MEGATRON_CPT = [sys.executable, "-m", "megatron_cpt"]  # `megatron-cpt` of this environment, regardless of PATH
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # one core per rank; torchrun would choose 1 too, with a long warning


class StepError(CptError):
    """Failure of a command, which has printed the reason."""

    def __init__(self, command: Sequence[str], status: int) -> None:
        self.exit_status = status
        super().__init__(f"this command ended with status {status}: {shlex.join(command)}")


@dataclass
class Walkthrough:
    """Runner of an example's steps and commands.

    Attributes:
        console: receives titles, commands and times.
        seconds: title of a finished step -> its wall time.
    """

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print a step's title before it and its time after it."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start
        self.console.print(f"[dim]{self.seconds[title]:.1f} s[/dim]\n")

    def run(self, command: Sequence[str]) -> None:
        """Print and run a command.

        Raises:
            StepError: the command failed.
        """
        shown = ["megatron-cpt", *command[3:]] if list(command[:3]) == MEGATRON_CPT else ["python", *command[1:]]
        self.console.print(f"$ {shlex.join(shown)}", style="cyan", markup=False, highlight=False, soft_wrap=True)
        environment = {**os.environ, **ONE_THREAD} if list(command[:3]) == TORCHRUN[:3] else None
        status = subprocess.run(command, check=False, env=environment).returncode
        if status != 0:
            # A negative status is a signal number; shells report 128 + signal.
            raise StepError(command, status if status > 0 else 128 - status)

    def times(self) -> Table:
        """Return a table with the time per step and in total."""
        table = Table(title="Time", title_justify="left")
        table.add_column("step")
        table.add_column("seconds", justify="right")
        for title, seconds in self.seconds.items():
            table.add_row(title, f"{seconds:.1f}")
        table.add_section()
        table.add_row("total", f"{sum(self.seconds.values()):.1f}", style="bold")
        return table


def preprocess_sources(
    walkthrough: Walkthrough,
    sources: Mapping[str, Collection[str]],
    texts: Path,
    data: Path,
    tokenizer: str,
    tokenizer_file: Path,
) -> None:
    """Preprocess `texts/SPLIT/NAME.jsonl` to `data/SPLIT/NAME`, unless that is newer than its text and tokenizer.

    Args:
        walkthrough: runs the commands.
        sources: split -> names.
        texts: folder of the JSONL files.
        data: folder for the `.bin`/`.idx` pairs.
        tokenizer: `KIND:PATH`.
        tokenizer_file: compared by modification time.
    """
    for split, names in sources.items():
        (data / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            text, prefix = texts / split / f"{name}.jsonl", data / split / name
            index = prefix.with_suffix(".idx")
            if index.exists() and index.stat().st_mtime > max(path.stat().st_mtime for path in (text, tokenizer_file)):
                continue
            for stale in (index, prefix.with_suffix(".bin")):
                stale.unlink(missing_ok=True)  # `preprocess` refuses to overwrite a dataset
            options = ["--input", str(text), "--output-prefix", str(prefix), "--tokenizer", tokenizer]
            walkthrough.run([*MEGATRON_CPT, "preprocess", *options, "--append-eod", "--workers", "2"])


def run_walkthrough(description: str | None, runs: Path, run_steps: Callable[[Walkthrough], None]) -> int:
    """Run a walkthrough as a script; `--fresh` deletes its runs first.

    Args:
        description: text of `--help`.
        runs: folder of the runs, relative to the project's root.
        run_steps: all steps; called in the project's root.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="delete earlier runs (not the data) and train again")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.fresh:
        shutil.rmtree(runs, ignore_errors=True)
    return run_tool(lambda: run_steps(Walkthrough(Console())))


def run_step(description: str | None, data: Path, prepare: Callable[[Path], RenderableType]) -> int:
    """Run one step of a walkthrough as a script and print its result.

    Args:
        description: text of `--help`.
        data: default of `--data`, the working folder.
        prepare: the step.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data, help="folder of the data (default: %(default)s)")
    arguments = parser.parse_args()
    return run_tool(lambda: Console().print(prepare(arguments.data)))
