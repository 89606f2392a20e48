"""Continued pretraining from start to finish, in minutes, on two CPU cores:

    python examples/quickstart/demo.py [--fresh]

real corpora -> a tokenizer -> .bin/.idx -> a small base model -> from its checkpoint two continued runs of equal length
over two ranks: the baseline goes on with the pretraining blend, the recipe moves from a general blend to a QA blend. At
the end a table and a picture, `runs/quickstart/quickstart.png`. Every step is the command that one would type, printed
before it runs; an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import corpora
import orjson
import results
import tokenizer
from rich.console import Console
from rich.table import Table
from sources import HELD_OUT, PRETRAINING, QUESTIONS

from megatron_cpt.errors import CptError

ROOT = Path(__file__).resolve().parents[2]  # paths in the run.yaml files are relative to it
HERE = Path("examples/quickstart")
DATA = Path("data/quickstart")
RUNS = Path("runs/quickstart")

MEGATRON_CPT = [sys.executable, "-m", "megatron_cpt"]  # the console command `megatron-cpt`, whatever PATH says
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SEQ_LENGTH = 256  # as in the run.yaml files
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # a rank a core; torchrun would choose the same, and say so at length

GROUPS = {
    "general text": [name for name in HELD_OUT if name not in QUESTIONS],
    "questions": [name for name in HELD_OUT if name in QUESTIONS],
}


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


def preprocess(story: Story) -> None:
    """Turns every source into a .bin/.idx pair, unless it is newer than its text and the tokenizer."""
    model = DATA / "tokenizer.model"
    for split, names in (("train", [*PRETRAINING, *QUESTIONS]), ("heldout", HELD_OUT)):
        (DATA / split).mkdir(exist_ok=True)
        for name in names:
            text, prefix = DATA / "text" / split / f"{name}.jsonl", DATA / split / name
            index = prefix.with_suffix(".idx")
            if index.exists() and index.stat().st_mtime > max(path.stat().st_mtime for path in (text, model)):
                continue
            for stale in (index, prefix.with_suffix(".bin")):
                stale.unlink(missing_ok=True)  # `preprocess` refuses to overwrite a data set
            options = ["--input", str(text), "--output-prefix", str(prefix), "--tokenizer", f"sentencepiece:{model}"]
            story.run([*MEGATRON_CPT, "preprocess", *options, "--append-eod", "--workers", "2"])


def train(story: Story, name: str) -> None:
    """Trains one of the three runs on two ranks; a run that is already at its end returns at once."""
    story.run([*TORCHRUN, "-m", "megatron_cpt", "train", str(HERE / f"{name}.yaml")])


def report(story: Story) -> None:
    """Prints the tables, and writes the picture and `results.json`."""
    base, baseline, recipe = (results.read_metrics(RUNS / name) for name in ("base", "baseline", "recipe"))
    rows = results.loss_rows(baseline, recipe, GROUPS)
    results.draw(base, baseline, recipe, rows, RUNS / "quickstart.png")
    story.console.print(results.reading_table([base, baseline, recipe], SEQ_LENGTH))
    story.console.print(results.loss_table(rows))
    story.console.print(f"Picture: {RUNS / 'quickstart.png'}")
    record = {"held_out_loss": rows, "seconds": story.seconds}
    (RUNS / "results.json").write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))


def tell(story: Story) -> None:
    """The whole story, top to bottom."""
    with story.step("Corpora: fetch, split, decontaminate"):
        story.console.print(corpora.accounts_table(corpora.prepare(DATA)))
    with story.step(f"Tokenizer: {tokenizer.VOCABULARY_SIZE:,} SentencePiece pieces of the pretraining sources"):
        story.console.print(str(tokenizer.train(DATA)))
    with story.step("Text to tokens: one .bin/.idx pair a source"):
        preprocess(story)
    with story.step("The recipe's plan: steps, phases, epochs, before anything runs"):
        RUNS.mkdir(parents=True, exist_ok=True)
        story.run([*MEGATRON_CPT, "plan", str(HERE / "recipe.yaml"), "--plot", str(RUNS / "plan.png")])
    with story.step("Base model: pretrained from eta_max down to eta_min, two data-parallel ranks"):
        train(story, "base")
    with story.step("Baseline: the pretraining blend goes on, tensor parallel over two ranks"):
        train(story, "baseline")
    with story.step("Recipe: general blend, then QA blend, everything else equal"):
        train(story, "recipe")
    with story.step("Results"):
        report(story)
    story.console.print(story.times())


def main() -> int:
    """Runs the demo and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs and train all three again")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.fresh:
        shutil.rmtree(RUNS, ignore_errors=True)
    try:
        tell(Story(Console()))
    except CptError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
