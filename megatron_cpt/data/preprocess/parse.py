"""Extract the texts of a block, and describe every line that gives no text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from megatron_cpt.data.preprocess.inputs import Block, BlockOptions
from megatron_cpt.data.preprocess.jsonl import read_range
from megatron_cpt.data.preprocess.tables import NoText, find_value

Wanted = tuple[str, bool, list[str]]
"""Key, whether it may name a nested value, and the texts found so far."""


class BadLine(NamedTuple):
    """Line or row that gave no document, numbered from 1 at the beginning of its block.

    Attributes:
        num_bytes: size of the line, or of a table's row with missing or extra columns; 0 for other rows.
    """

    line: int
    reason: str
    num_bytes: int = 0

    @property
    def kind(self) -> str:
        """Return the reason without what differs from line to line."""
        return re.split(r"[:;]| at byte ", self.reason)[0]


@dataclass(frozen=True)
class ParsedBlock:
    """Texts of a block.

    Attributes:
        texts: texts per key, in the order of the keys.
        num_ends: line ends in the block, or rows.
        num_lines: lines that are not blank, or rows.
        num_bytes: size of the lines, or of the texts of the rows.
    """

    texts: list[list[str]]
    bad_lines: list[BadLine]
    num_ends: int
    num_lines: int
    num_bytes: int


def parse_block(block: Block, options: BlockOptions) -> ParsedBlock:
    """Return the texts and the bad lines of a block; a line without one of several keys is bad and gives the others."""
    if block.rows is None and block.values is None:
        return _parse_lines(block, options)
    return _parse_rows(block, options)


def _parse_lines(block: Block, options: BlockOptions) -> ParsedBlock:
    lines = block.lines or read_range(block.path, block.position, block.end, options.max_line_bytes)
    parsed = ParsedBlock([[] for _ in options.keys], [], lines.num_ends, 0, 0)
    num_blank, number = 0, lines.skipped
    wanted = [(key, "." in key, texts) for key, texts in zip(options.keys, parsed.texts, strict=True)]
    for number, line in enumerate(lines, lines.skipped + 1):
        if len(line) > options.max_line_bytes:
            parsed.bad_lines.append(BadLine(number, _too_long(options), len(line)))
            continue
        try:
            row = orjson.loads(line)
            for key, is_nested, texts in wanted:
                text = _find_nested(row, key) if is_nested else row[key]
                if type(text) is not str:
                    raise TypeError
                texts.append(text)
        except (ValueError, LookupError, TypeError):
            if not bytes(line).strip():
                num_blank += 1
            elif reason := _parse_bad_line(bytes(line), wanted):
                parsed.bad_lines.append(BadLine(number, reason, len(line)))
    num_lines = number - lines.skipped - num_blank
    num_bytes = block.end - block.position
    if lines.is_overlong:  # the size of such a line in a plain file is not known: it counts as just too long
        parsed.bad_lines.append(BadLine(number + 1, _too_long(options), max(num_bytes, options.max_line_bytes)))
        num_lines += 1
    return ParsedBlock(parsed.texts, parsed.bad_lines, lines.num_ends, num_lines, num_bytes)


def _find_nested(row: Any, key: str) -> Any:
    return row[key] if key in row else find_value(row, key.split("."))


def _parse_bad_line(line: bytes, wanted: Sequence[Wanted]) -> str:
    """Take the good texts of a line that orjson does not read or that lacks one, and return what is wrong with it.

    Python's `json`, and so Megatron-LM, accepts more: NaN, infinity, and lone surrogates, which no text may hold.

    Returns:
        The reason; empty if nothing is wrong.
    """
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    reason, num_taken = "", 0
    try:
        row = orjson.loads(line)
        num_taken = _count_texts(row, wanted)  # taken before the first bad key was met
    except orjson.JSONDecodeError as error:
        reason = f"not JSON: {error}"
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            hint = ", it holds zero bytes; UTF-16 needs its byte order mark" if b"\0" in line else ""
            return f"{reason}{hint}"
    if not isinstance(row, dict):
        return f"not an object, but a JSON {type(row).__name__}"
    if reason and any(_holds_surrogate(_value(row, key)) for key, _, _ in wanted):
        return reason
    reason = ""
    for number, (key, _, texts) in enumerate(wanted):
        text = _value(row, key)
        if type(text) is str:
            if number >= num_taken:
                texts.append(text)
        elif not reason and text is _MISSING:
            reason = f"has no key {key!r}; it has {', '.join(map(repr, list(row)[:8])) or 'none'}"
        elif not reason:
            reason = _not_a_text(key, text)
    return reason


_MISSING = object()


def _value(row: Any, key: str) -> Any:
    try:
        return _find_nested(row, key)
    except LookupError:
        return _MISSING


def _count_texts(row: Any, wanted: Sequence[Wanted]) -> int:
    """Return how many of the first keys have a text."""
    if not isinstance(row, dict):
        return 0
    found = [type(_value(row, key)) is str for key, _, _ in wanted]
    return found.index(False) if False in found else len(found)


def _holds_surrogate(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _parse_rows(block: Block, options: BlockOptions) -> ParsedBlock:
    if block.values is not None:
        columns = block.values
    else:
        from megatron_cpt.data.preprocess.parquet import unpack_columns

        assert block.rows is not None
        columns = unpack_columns(block.rows, options.keys)
    texts: list[list[str]] = []
    bad: dict[int, tuple[str, int]] = {}
    num_rows = 0
    for key, values in zip(options.keys, columns, strict=True):
        num_rows = len(values)
        texts.append([value for value in values if type(value) is str])
        for number, value in enumerate(values, 1):
            if type(value) is not str:
                num_bytes = value.num_bytes if isinstance(value, NoText) else 0
                bad.setdefault(number, (_not_a_text(key, value), num_bytes))
    bad_lines = [BadLine(number, *problem) for number, problem in sorted(bad.items())]
    num_bytes = sum(len(text) for column in texts for text in column) + sum(line.num_bytes for line in bad_lines)
    return ParsedBlock(texts, bad_lines, num_rows, num_rows, num_bytes)


def _not_a_text(key: str, value: Any) -> str:
    if isinstance(value, NoText):
        return value.reason
    if isinstance(value, bytes):
        return f"the value of {key!r} is not UTF-8"
    return f"the value of {key!r} is not a string, but {type(value).__name__}"


def _too_long(options: BlockOptions) -> str:
    return f"longer than {options.max_line_bytes:,} bytes"
