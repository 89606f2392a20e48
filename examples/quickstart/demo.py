"""Continued pretraining from start to finish, in minutes, on two CPU cores:

    python examples/quickstart/demo.py [--fresh]

real corpora -> a tokenizer -> .bin/.idx -> a small base model -> from its checkpoint two continued runs of equal length
over two ranks: the baseline goes on with the pretraining blend, the recipe moves from a general blend to a QA blend. At
the end a table and a picture, `runs/quickstart/quickstart.png`. Every step is the command that one would type, printed
before it runs; an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import corpora
import orjson
import results
import tokenizer
from sources import HELD_OUT, PRETRAINING, QUESTIONS
from story import MEGATRON_CPT, TORCHRUN, Story, preprocess_sources, run_story

HERE = Path("examples/quickstart")
DATA = Path("data/quickstart")
RUNS = Path("runs/quickstart")

SEQ_LENGTH = 256  # as in the run.yaml files

GROUPS = {
    "general text": [name for name in HELD_OUT if name not in QUESTIONS],
    "questions": [name for name in HELD_OUT if name in QUESTIONS],
}


def preprocess(story: Story) -> None:
    """Turns every source into a .bin/.idx pair, unless it is newer than its text and the tokenizer."""
    model = DATA / "tokenizer.model"
    sources = {"train": [*PRETRAINING, *QUESTIONS], "heldout": list(HELD_OUT)}
    preprocess_sources(story, sources, DATA / "text", DATA, f"sentencepiece:{model}", model)


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


if __name__ == "__main__":
    sys.exit(run_story(__doc__, RUNS, tell))
