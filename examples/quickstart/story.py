"""How an example tells what it does: numbered, timed steps, each command printed before it runs."""

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
MEGATRON_CPT = [sys.executable, "-m", "megatron_cpt"]  # the console command `megatron-cpt`, whatever PATH says
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # a rank a core; torchrun would choose the same, and say so at length


class StepError(CptError):
    """A command of the demo failed; it has printed why."""

    def __init__(self, command: Sequence[str], status: int) -> None:
        self.exit_status = status
        super().__init__(f"this command ended with status {status}: {shlex.join(command)}")


@dataclass
class Story:
    """Tells each step and how long it took."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Prints a step's title before it and its time after it."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start
        self.console.print(f"[dim]{self.seconds[title]:.1f} s[/dim]\n")

    def run(self, command: Sequence[str]) -> None:
        """Prints and runs a command.

        Raises:
            StepError: it failed.
        """
        shown = ["megatron-cpt", *command[3:]] if list(command[:3]) == MEGATRON_CPT else ["python", *command[1:]]
        self.console.print(f"$ {shlex.join(shown)}", style="cyan", markup=False, highlight=False, soft_wrap=True)
        environment = {**os.environ, **ONE_THREAD} if list(command[:3]) == TORCHRUN[:3] else None
        status = subprocess.run(command, check=False, env=environment).returncode
        if status != 0:
            # A negative status is the signal that ended it; a shell says 128 + signal.
            raise StepError(command, status if status > 0 else 128 - status)

    def times(self) -> Table:
        """Returns the time of each step and of all."""
        table = Table(title="Time", title_justify="left")
        table.add_column("step")
        table.add_column("seconds", justify="right")
        for title, seconds in self.seconds.items():
            table.add_row(title, f"{seconds:.1f}")
        table.add_section()
        table.add_row("all", f"{sum(self.seconds.values()):.1f}", style="bold")
        return table


def preprocess_sources(
    story: Story, sources: Mapping[str, Collection[str]], texts: Path, data: Path, tokenizer: str, tokenizer_file: Path
) -> None:
    """Turns `texts/SPLIT/NAME.jsonl` into the pair `data/SPLIT/NAME`, unless it is newer than its text and tokenizer.

    Args:
        story: prints and runs the commands.
        sources: split -> names.
        texts, data: folders of the texts and of the pairs.
        tokenizer: `KIND:PATH`.
        tokenizer_file: the file whose time counts.
    """
    for split, names in sources.items():
        (data / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            text, prefix = texts / split / f"{name}.jsonl", data / split / name
            index = prefix.with_suffix(".idx")
            if index.exists() and index.stat().st_mtime > max(path.stat().st_mtime for path in (text, tokenizer_file)):
                continue
            for stale in (index, prefix.with_suffix(".bin")):
                stale.unlink(missing_ok=True)  # `preprocess` refuses to overwrite a data set
            options = ["--input", str(text), "--output-prefix", str(prefix), "--tokenizer", tokenizer]
            story.run([*MEGATRON_CPT, "preprocess", *options, "--append-eod", "--workers", "2"])


def run_story(description: str | None, runs: Path, tell: Callable[[Story], None]) -> int:
    """Tells a story as a script: `--fresh` forgets its runs first.

    Args:
        description: for `--help`.
        runs: the folder of its runs, relative to the project's root.
        tell: the whole story, told from the project's root.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs (not the data) and do them again")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.fresh:
        shutil.rmtree(runs, ignore_errors=True)
    return run_tool(lambda: tell(Story(Console())))


def run_step(description: str | None, data: Path, prepare: Callable[[Path], RenderableType]) -> int:
    """Runs one step of a story as a script.

    Args:
        description: for `--help`.
        data: the folder that it works in, unless `--data` names another.
        prepare: the step; what it returns is printed.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data, help="the folder of the data (default: %(default)s)")
    arguments = parser.parse_args()
    return run_tool(lambda: Console().print(prepare(arguments.data)))
