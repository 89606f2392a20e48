"""Train a SentencePiece vocabulary of 4,096 pieces on the pretraining sources, in a few seconds.

    python examples/quickstart/tokenizer.py [--data data/quickstart]

writes `tokenizer.model`. The QA sources are not read: in real continued pretraining, the tokenizer is older than the
data that is added.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import sentencepiece
from corpora import DEFAULT_DATA
from sources import PRETRAINING
from walkthrough import run_step

VOCABULARY_SIZE = 4096
# Equal parts: with all text, two thirds of the pieces would be Python.
CHARACTERS_PER_SOURCE = 600_000
LONGEST_LINE = 4000  # characters; SentencePiece skips longer ones, so they are cut


def train(data: Path = DEFAULT_DATA) -> Path:
    """Train the tokenizer unless it is newer than the corpora; return its path."""
    path = data / "tokenizer.model"
    if path.exists() and path.stat().st_mtime > (data / "corpora.json").stat().st_mtime:
        return path
    with path.with_suffix(".partial").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(data / "text" / "train"),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCABULARY_SIZE,
            character_coverage=0.9995,
            byte_fallback=True,  # rare characters and line breaks become bytes, so no text is unknown
            split_digits=True,
            # White space matters in code: keep every character, and let runs of spaces become pieces.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LONGEST_LINE,  # bytes
            num_threads=2,
            minloglevel=1,
        )
    path.with_suffix(".partial").rename(path)
    return path


def training_lines(folder: Path) -> Iterator[str]:
    """Yield lines of the pretraining sources, about equally many characters of each."""
    for name in PRETRAINING:
        num_characters = 0
        with (folder / f"{name}.jsonl").open("rb") as rows:
            for row in rows:
                for line in orjson.loads(row)["text"].splitlines():
                    num_characters += len(line)
                    yield line[:LONGEST_LINE]
                if num_characters > CHARACTERS_PER_SOURCE:
                    break


if __name__ == "__main__":
    sys.exit(run_step(__doc__, DEFAULT_DATA, lambda data: str(train(data))))
