"""Extract the texts of a block, and describe every line that gives no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_cpt.data.preprocess.inputs import Block, BlockOptions
from megatron_cpt.data.preprocess.jsonl import read_range


@dataclass(frozen=True)
class BadLine:
    """Line or row that gave no document, and the reason."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class ParsedBlock:
    """Texts of a block.

    Attributes:
        texts: texts per key, in the order of the keys.
        bad_lines: bad lines, numbered from 1 at the beginning of the block.
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
        parsed.bad_lines.append(BadLine(block.path, parsed.num_ends + 1, block.damage))
    return parsed


def _parse_lines(block: Block, options: BlockOptions) -> ParsedBlock:
    lines = block.lines or read_range(block.path, block.position, block.end, options.max_line_bytes)
    parsed = ParsedBlock([[] for _ in options.keys], [], lines.num_ends, 0)
    num_blank, number = 0, lines.skipped
    wanted = list(zip(options.keys, parsed.texts, strict=True))
    for number, line in enumerate(lines, lines.skipped + 1):
        if len(line) > options.max_line_bytes:
            parsed.bad_lines.append(BadLine(block.path, number, _too_long(options)))
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
                _take_good_keys(bytes(line), block.path, number, wanted, parsed)
            else:
                num_blank += 1
    num_lines = number - lines.skipped - num_blank
    if lines.is_overlong:
        parsed.bad_lines.append(BadLine(block.path, number + 1, _too_long(options)))
        num_lines += 1
    return ParsedBlock(parsed.texts, parsed.bad_lines, lines.num_ends, num_lines)


def _take_good_keys(
    line: bytes, path: str, number: int, wanted: Sequence[tuple[str, list[str]]], parsed: ParsedBlock
) -> None:
    """Record a bad line, and take its good texts after the first bad key; the texts before it were taken already."""
    reason = _describe_bad_line(line, [key for key, _ in wanted])
    parsed.bad_lines.append(BadLine(path, number, reason))
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return
    if not isinstance(row, dict):
        return
    failed = False
    for key, texts in wanted:
        text = row.get(key)
        if type(text) is not str:
            failed = True
        elif failed:
            texts.append(text)


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
    bad_lines = [BadLine(block.path, number, bad[number]) for number in sorted(bad)]
    return ParsedBlock(texts, bad_lines, num_rows, num_rows)


def _not_a_text(key: str, value: Any) -> str:
    if isinstance(value, bytes):
        return f"the value of {key!r} is not UTF-8"
    return f"the value of {key!r} is not a string, but {type(value).__name__}"


def _too_long(options: BlockOptions) -> str:
    return f"longer than {options.max_line_bytes:,} bytes"


def _describe_bad_line(line: bytes, keys: Sequence[str]) -> str:
    """Return why a bad line does not give every text."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"not JSON: {error}"
    if not isinstance(content, dict):
        return f"not an object, but a JSON {type(content).__name__}"
    for key in keys:
        if key not in content:
            return f"has no key {key!r}; it has {', '.join(map(repr, list(content)[:8])) or 'none'}"
        if type(content[key]) is not str:
            return _not_a_text(key, content[key])
    raise AssertionError("the line is good")
