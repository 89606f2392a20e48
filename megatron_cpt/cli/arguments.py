"""Options with several values, as in `--input a.jsonl b.jsonl`, which typer's parser does not support."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_cpt.errors import UserError

MANY_VALUES = {
    "preprocess": ("--input", "--key"),
    "merge": ("--input",),
    "split": ("--input",),
    "overlap": ("--train", "--held-out", "--key"),
    "mine": ("--queries", "--corpus", "--held-out", "--key"),
    "train": ("--allow",),
    "evaluate": ("--tasks",),
    "average": ("--weights", "--evaluate"),
    "report": ("--compare",),
    "recipe": ("--general", "--qa", "--quality", "--held-out", "--area"),
}
"""Options with several values, per command."""

_RUN_ENDINGS = (".yaml", ".yml")
_NUMBER = re.compile(r"-\d*\.?\d+(e-?\d+)?")  # a value that is not an option, such as -0.5


def repeat_options(argv: Sequence[str]) -> list[str]:
    """Rewrite `--input a b` as `--input a --input b`.

    Raises:
        UserError: an option with several values has none.
    """
    command = next((word for word in argv if not word.startswith("-")), "")
    words: list[str] = []
    current = ""  # the option that the next value belongs to
    has_value = False
    for number, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[number:]]
        if word.startswith("-") and word != "-" and not (current and _NUMBER.fullmatch(word)):
            current, has_value = word if word in MANY_VALUES.get(command, ()) else "", False
            following = argv[number + 1 : number + 2]
            if current and (not following or following[0].startswith("--")):
                raise UserError(f"{current}: give at least one value after it")
        elif (command in ("train", "evaluate") and "=" in word) or (command == "train" and word.endswith(_RUN_ENDINGS)):
            current = ""  # an override, or the run; a task of `evaluate` may be a file
        elif current:
            words += [current] if has_value else []
            has_value = True
        words.append(word)
    return words
