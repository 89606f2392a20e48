"""Read text files that are not JSON: tables of comma- or tab-separated values, and files of one document each.

A value that is not a text is None, `bytes` (not UTF-8) or a `NoText`; nested values are found by `find_value`.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from megatron_cpt.data.preprocess.file_format import FileFormat
from megatron_cpt.data.preprocess.streams import ByteStream, DamageError
from megatron_cpt.errors import UserError

_MAX_ROWS = 1 << 14


class NoText(NamedTuple):
    """Value that stands for a row without text, with the reason and the size of the row."""

    reason: str
    num_bytes: int = 0


def find_value(value: Any, parts: Sequence[str]) -> Any:
    """Return a part of nested objects and lists. Example: `{"parts": ["a", "b"]}` and parts, 1: "b".

    Raises:
        LookupError: there is no such part.
    """
    for part in parts:
        if type(value) is dict:
            value = value[part]
        elif type(value) is list and part.isdigit():
            value = value[int(part)]
        else:
            raise KeyError(part)
    return value


class ValueCut(NamedTuple):
    """Rows [position, end) of a file: the values of each key, and the damage found after them."""

    position: int
    end: int
    values: list[list[Any]]
    damage: str | None = None


def cut_document(path: str, stream: ByteStream, keys: Sequence[str], max_bytes: int) -> Iterator[ValueCut]:
    """Yield a file as one document.

    Raises:
        UserError: several keys are wanted.
    """
    if len(keys) != 1:
        raise UserError(
            f"input {path}: a .txt file is one document and has no keys; give one key, not {', '.join(keys)}"
        )
    pieces, size = list[bytes](), 0
    try:
        for piece in stream:
            size += len(piece)
            if size <= max_bytes:
                pieces.append(piece)
    except DamageError as error:
        yield ValueCut(0, 1, [[]], str(error))
        return
    data = b"".join(pieces)
    yield ValueCut(0, 1, [[_text(data) if size <= max_bytes else NoText(f"longer than {max_bytes:,} bytes")]])


def cut_table(
    path: str, stream: ByteStream, form: FileFormat, keys: Sequence[str], block_bytes: int, max_line_bytes: int
) -> Iterator[ValueCut]:
    """Yield the rows of a table in blocks of about `block_bytes`; its first row names the columns.

    Raises:
        UserError: a key is not a column.
    """
    csv.field_size_limit(max_line_bytes)
    is_over = False

    def lines() -> Iterator[str]:
        nonlocal is_over
        yield from _text_lines(stream, max_line_bytes)
        is_over = True

    rows = csv.reader(lines(), delimiter=form.delimiter)
    values: list[list[Any]] = [[] for _ in keys]
    position = row_number = size = 0
    try:
        names = next(rows, [])
        if missing := [key for key in keys if key not in names]:
            known = ", ".join(map(repr, names[:8])) or "none"
            raise UserError(f"input {path}: has no column {missing[0]!r}; its columns are {known}")
        columns = [names.index(key) for key in keys]
        for row in rows:
            if is_over:  # the reader asks for a line after the last one only inside of quotes
                raise DamageError(f"row {row_number + 1} begins a quoted value that does not end")
            if not row:
                continue
            row_number += 1
            num_bytes, is_whole = sum(map(len, row)), len(row) == len(names)
            problem = f"has another number of columns than the first row: {len(row)}, not {len(names)}"
            for column, texts in zip(columns, values, strict=True):
                text = _text(row[column].encode("utf-8", "surrogateescape")) if is_whole else NoText(problem, num_bytes)
                texts.append(text)
            size += num_bytes
            if size >= block_bytes or row_number - position >= _MAX_ROWS:
                yield ValueCut(position, row_number, values)
                position, size, values = row_number, 0, [[] for _ in keys]
    except (DamageError, csv.Error) as error:
        yield ValueCut(position, row_number + 1, values, str(error))
        return
    if row_number > position:
        yield ValueCut(position, row_number, values)


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _text_lines(pieces: Iterable[bytes], max_line_bytes: int) -> Iterator[str]:
    """Yield text lines with their ends; bytes that are not UTF-8 become lone surrogates."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + decoder.decode(piece)).split("\n")
        for line in lines:
            yield line + "\n"
        if len(rest) > max_line_bytes:
            raise DamageError(f"a line is longer than {max_line_bytes:,} bytes")
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest
