"""Options that take several values, as in `--input a.jsonl b.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_cpt.errors import UserError


@dataclass(frozen=True)
class ManyValues:
    """An option of a command that may be followed by more than one value.

    Attributes:
        option: its long name.
        ends_before: whether a word is no value of it but the next positional argument.
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
"""By command."""


def repeat_options(argv: Sequence[str]) -> list[str]:
    """Write `--input a b` as `--input a --input b`, the only form that the parser knows.

    Raises:
        UserError: such an option has no value.
    """
    command = next((word for word in argv if not word.startswith("-")), "")
    options = {many.option: many for many in MANY_VALUES.get(command, ())}
    words: list[str] = []
    current: ManyValues | None = None
    repeated = False
    for number, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[number:]]
        if word.startswith("-") and word != "-":
            current, repeated = options.get(word), False
            if current is not None:
                _require_value(current.option, argv[number + 1 : number + 2])
        elif current is not None and current.ends_before(word):
            current = None
        elif current is not None:
            words += [current.option] if repeated else []
            repeated = True
        words.append(word)
    return words


def _require_value(option: str, following: Sequence[str]) -> None:
    if not following or following[0].startswith("--"):
        raise UserError(f"{option}: give at least one value after it")
