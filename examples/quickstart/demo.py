"""Continued pretraining from start to finish on two CPU cores, in minutes:

    python examples/quickstart/demo.py [--fresh]

Steps: real corpora, a tokenizer, `.bin`/`.idx` pairs, a small base model, and two continued runs of equal length from
its checkpoint. The baseline keeps the pretraining blend; the recipe moves from a general blend to a QA blend. The demo
ends with a table, a picture and a report of the recipe beside the baseline, `runs/quickstart/report.html`. Run it again
to resume an interrupted demo.
"""

from __future__ import annotations

import sys
from pathlib import Path

import corpora
import orjson
import results
import tokenizer
from sources import HELD_OUT, PRETRAINING, QUESTIONS
from walkthrough import MEGATRON_CPT, TORCHRUN, Walkthrough, preprocess_sources, run_walkthrough

HERE = Path("examples/quickstart")
DATA = Path("data/quickstart")
RUNS = Path("runs/quickstart")

SEQ_LENGTH = 256  # as in the run.yaml files

GROUPS = {
    "general text": [name for name in HELD_OUT if name not in QUESTIONS],
    "questions": [name for name in HELD_OUT if name in QUESTIONS],
}


def preprocess(walkthrough: Walkthrough) -> None:
    """Turn every source into a .bin/.idx pair, unless the pair is newer than its text and the tokenizer."""
    model = DATA / "tokenizer.model"
    sources = {"train": [*PRETRAINING, *QUESTIONS], "heldout": list(HELD_OUT)}
    preprocess_sources(walkthrough, sources, DATA / "text", DATA, f"sentencepiece:{model}", model)


def train(walkthrough: Walkthrough, name: str) -> None:
    """Train one of the three runs on two ranks; a finished run returns immediately."""
    walkthrough.run([*TORCHRUN, "-m", "megatron_cpt", "train", str(HERE / f"{name}.yaml")])


def report(walkthrough: Walkthrough) -> None:
    """Print the tables; write the picture, `results.json` and the report of the recipe beside the baseline."""
    base, baseline, recipe = (results.read_metrics(RUNS / name) for name in ("base", "baseline", "recipe"))
    rows = results.loss_rows(baseline, recipe, GROUPS)
    results.draw(base, baseline, recipe, rows, RUNS / "quickstart.png")
    walkthrough.console.print(results.reading_table([base, baseline, recipe], SEQ_LENGTH))
    walkthrough.console.print(results.loss_table(rows))
    walkthrough.console.print(f"Picture: {RUNS / 'quickstart.png'}")
    page = ["--compare", str(RUNS / "baseline"), "--output", str(RUNS / "report.html")]
    walkthrough.run([*MEGATRON_CPT, "report", str(RUNS / "recipe"), *page])
    walkthrough.console.print(f"Report: open {(RUNS / 'report.html').resolve()} in a browser", soft_wrap=True)
    record = {"held_out_loss": rows, "seconds": walkthrough.seconds}
    (RUNS / "results.json").write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))


def run_steps(walkthrough: Walkthrough) -> None:
    """Run all steps of the demo."""
    with walkthrough.step("Corpora: fetch, split, decontaminate"):
        walkthrough.console.print(corpora.accounts_table(corpora.prepare(DATA)))
    with walkthrough.step(f"Tokenizer: {tokenizer.VOCABULARY_SIZE:,} SentencePiece pieces of the pretraining sources"):
        walkthrough.console.print(str(tokenizer.train(DATA)))
    with walkthrough.step("Text to tokens: one .bin/.idx pair per source"):
        preprocess(walkthrough)
    with walkthrough.step("Plan of the recipe: steps, phases and epochs before anything runs"):
        RUNS.mkdir(parents=True, exist_ok=True)
        walkthrough.run([*MEGATRON_CPT, "plan", str(HERE / "recipe.yaml"), "--plot", str(RUNS / "plan.png")])
    with walkthrough.step("Base model: pretraining from eta_max to eta_min on two data-parallel ranks"):
        train(walkthrough, "base")
    with walkthrough.step("Baseline: continued with the pretraining blend, tensor parallel over two ranks"):
        train(walkthrough, "baseline")
    with walkthrough.step("Recipe: general blend, then QA blend, all else equal"):
        train(walkthrough, "recipe")
    with walkthrough.step("Results"):
        report(walkthrough)
    walkthrough.console.print(walkthrough.times())


if __name__ == "__main__":
    sys.exit(run_walkthrough(__doc__, RUNS, run_steps))
