"""YAML in which every value has a comment with its reason.

Example: {"tokens": Reasoned(300_000, "given by --tokens")} becomes

    tokens: 300000  # given by --tokens

A comment that does not fit beside its value stands above it. Names and paths of the user enter comments and quoted text
only escaped: a line feed in a source's name would otherwise end the comment, and the rest would be a key.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megatron_cpt.config import dump_yaml

_WIDTH = 120
_PLAIN_IN_LIST = re.compile(r"[\w./+-]+", re.ASCII)

Value = TypeVar("Value", covariant=True)


@dataclass(frozen=True)
class Reasoned(Generic[Value]):
    """Value with the reason for it, a phrase or sentences without a final period."""

    value: Value
    reason: str


Node = Reasoned[Any] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Value, section of nodes, or list of sections."""


def without_reasons(node: Node) -> Any:
    """Return the plain values of a node."""
    if isinstance(node, Reasoned):
        return node.value
    if isinstance(node, Mapping):
        return {key: without_reasons(child) for key, child in node.items()}
    return [without_reasons(entry) for entry in node]


def dump_commented(sections: Mapping[str, Node], head: str) -> str:
    """Return YAML text with one comment per value.

    Args:
        sections: the top level, in order.
        head: comment at the top of the file; a blank line starts a new paragraph.
    """
    paragraphs = [_comment_lines(paragraph, _WIDTH) for paragraph in head.split("\n\n")]
    lines = [line for paragraph in paragraphs for line in ["#", *paragraph]][1:]
    after_section = True
    for key, node in sections.items():
        is_section = not isinstance(node, Reasoned)
        lines += [*([""] if is_section or after_section else []), *_entry(key, node, _WIDTH)]
        after_section = is_section
    return "".join(f"{line}\n" for line in lines)


def printable(text: str) -> str:
    """Return a text in one line; characters that end a line or do not show are written as Python writes them."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _entry(key: str, node: Node, width: int) -> list[str]:
    if isinstance(node, Reasoned):
        return _value(key, node, width)
    if isinstance(node, Mapping):
        return [f"{_text(key)}:", *_indented(_section(node, width - 2))]
    entries = [_list_entry(_section(entry, width - 4)) for entry in node]
    return [f"{_text(key)}:", *_indented([line for lines in entries for line in lines])]


def _section(section: Mapping[str, Node], width: int) -> list[str]:
    return [line for key, node in section.items() for line in _entry(key, node, width)]


def _value(key: str, node: Reasoned[Any], width: int) -> list[str]:
    line = f"{_text(key)}: {_scalar(node.value)}"
    beside = f"{line}  # {printable(node.reason)}"
    return [beside] if len(beside) <= width else [*_comment_lines(node.reason, width), line]


def _list_entry(lines: list[str]) -> list[str]:
    """Indent the lines of a list's entry; its dash goes before the first key, below a comment above that key."""
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [f"{'- ' if number == first else '  '}{line}" for number, line in enumerate(lines)]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _comment_lines(text: str, width: int) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(printable(text), width - 2, break_on_hyphens=False)]


def _scalar(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_list_item, value))}]"
    return _text(value) if isinstance(value, str) else _dumped(value)


def _list_item(value: Any) -> str:
    if isinstance(value, str):
        return value if _dumped(value) == value and _PLAIN_IN_LIST.fullmatch(value) else _quoted(value)
    return _dumped(value)


def _text(text: str) -> str:
    """Return a text as YAML in one line."""
    dumped = _dumped(text)
    return dumped if "\n" not in dumped and dumped.isprintable() else _quoted(text)


def _dumped(value: Any) -> str:
    return dump_yaml({"k": value}).removeprefix("k:").strip(" \n")


def _quoted(text: str) -> str:
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    return char if char.isprintable() else f"\\U{ord(char):08x}"
