"""Options with several values, as in `--input a.jsonl b.jsonl`, which typer's parser does not support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_cpt.errors import UserError


@dataclass(frozen=True)
class ManyValues:
    """Option that may be followed by several values.

    Attributes:
        option: long name.
        ends_before: returns True for a word that is a positional argument instead of a value.
    """

    option: str
    ends_before: Callable[[str], bool] = lambda word: False


def _is_run_or_override(word: str) -> bool:
    return "=" in word or word.endswith((".yaml", ".yml"))


MANY_VALUES = {
    "preprocess": (ManyValues("--input"), ManyValues("--key")),
    "merge": (ManyValues("--input"),),
    "split": (ManyValues("--input"),),
    "overlap": (ManyValues("--train"), ManyValues("--held-out"), ManyValues("--key")),
    "train": (ManyValues("--allow", _is_run_or_override),),
}
"""Options with several values, per command."""


def repeat_options(argv: Sequence[str]) -> list[str]:
    """Rewrite `--input a b` as `--input a --input b`.

    Raises:
        UserError: an option with several values has none.
    """
    command = next((word for word in argv if not word.startswith("-")), "")
    options = {many.option: many for many in MANY_VALUES.get(command, ())}
    words: list[str] = []
    current: ManyValues | None = None
    has_value = False
    for number, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[number:]]
        if word.startswith("-") and word != "-":
            current, has_value = options.get(word), False
            if current is not None:
                _require_value(current.option, argv[number + 1 : number + 2])
        elif current is not None and current.ends_before(word):
            current = None
        elif current is not None:
            words += [current.option] if has_value else []
            has_value = True
        words.append(word)
    return words


def _require_value(option: str, following: Sequence[str]) -> None:
    if not following or following[0].startswith("--"):
        raise UserError(f"{option}: give at least one value after it")
