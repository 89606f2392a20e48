"""Extract the texts of a block, and describe every line that gives no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from megatron_cpt.data.preprocess.inputs import Block, BlockOptions
from megatron_cpt.data.preprocess.jsonl import read_range


class BadLine(NamedTuple):
    """Line or row that gave no document, numbered from 1 at the beginning of its block, and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class ParsedBlock:
    """Texts of a block.

    Attributes:
        texts: texts per key, in the order of the keys.
        num_ends: line ends in the block, or rows.
        num_lines: lines that are not blank, or rows.
    """

    texts: list[list[str]]
    bad_lines: list[BadLine]
    num_ends: int
    num_lines: int


def parse_block(block: Block, options: BlockOptions) -> ParsedBlock:
    """Return the texts and the bad lines of a block; a line without one of several keys is bad and gives the others."""
    parsed = _parse_rows(block, options) if block.rows is not None else _parse_lines(block, options)
    if block.damage is not None:  # found after the last line of the block
        parsed.bad_lines.append(BadLine(parsed.num_ends + 1, block.damage))
    return parsed


def _parse_lines(block: Block, options: BlockOptions) -> ParsedBlock:
    lines = block.lines or read_range(block.path, block.position, block.end, options.max_line_bytes)
    parsed = ParsedBlock([[] for _ in options.keys], [], lines.num_ends, 0)
    num_blank, number = 0, lines.skipped
    wanted = list(zip(options.keys, parsed.texts, strict=True))
    for number, line in enumerate(lines, lines.skipped + 1):
        if len(line) > options.max_line_bytes:
            parsed.bad_lines.append(BadLine(number, _too_long(options)))
            continue
        try:
            row = orjson.loads(line)
            for key, texts in wanted:
                text = row[key]
                if type(text) is not str:
                    raise TypeError
                texts.append(text)
        except (ValueError, KeyError, TypeError):
            if bytes(line).strip():
                parsed.bad_lines.append(BadLine(number, _parse_bad_line(bytes(line), wanted)))
            else:
                num_blank += 1
    num_lines = number - lines.skipped - num_blank
    if lines.is_overlong:
        parsed.bad_lines.append(BadLine(number + 1, _too_long(options)))
        num_lines += 1
    return ParsedBlock(parsed.texts, parsed.bad_lines, lines.num_ends, num_lines)


def _parse_bad_line(line: bytes, wanted: Sequence[tuple[str, list[str]]]) -> str:
    """Take the good texts of a bad line, and return what is wrong with it."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict):
        return f"not an object, but a JSON {type(row).__name__}"
    reason = ""
    for key, texts in wanted:
        if type(text := row.get(key)) is str:
            if reason:  # the texts before the first bad key were taken already
                texts.append(text)
        elif not reason and key not in row:
            reason = f"has no key {key!r}; it has {', '.join(map(repr, list(row)[:8])) or 'none'}"
        elif not reason:
            reason = _not_a_text(key, text)
    return reason


def _parse_rows(block: Block, options: BlockOptions) -> ParsedBlock:
    from megatron_cpt.data.preprocess.parquet import unpack_columns

    assert block.rows is not None
    texts: list[list[str]] = []
    bad: dict[int, str] = {}
    num_rows = 0
    for key, values in zip(options.keys, unpack_columns(block.rows, options.keys), strict=True):
        num_rows = len(values)
        texts.append([value for value in values if type(value) is str])
        for number, value in enumerate(values, 1):
            if type(value) is not str:
                bad.setdefault(number, _not_a_text(key, value))
    return ParsedBlock(texts, [BadLine(*item) for item in sorted(bad.items())], num_rows, num_rows)


def _not_a_text(key: str, value: Any) -> str:
    if isinstance(value, bytes):
        return f"the value of {key!r} is not UTF-8"
    return f"the value of {key!r} is not a string, but {type(value).__name__}"


def _too_long(options: BlockOptions) -> str:
    return f"longer than {options.max_line_bytes:,} bytes"
