"""Read a file from its beginning as pieces of UTF-8: unpacked, decoded, and JSON arrays cut into lines."""

from __future__ import annotations

import bz2
import codecs
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import zstandard

from megatron_cpt.data.preprocess.file_format import FileFormat
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import open_reader

_PACKED_READ = 1 << 18  # less than a block, as it grows when unpacked
_ZSTD_READ = 1 << 10  # at least 4 bytes per Zstandard block, at most 128 KiB out of each: at most 32 MiB per read
_UNPACKED_PIECE = 1 << 20
_MAX_WINDOW = 1 << 31  # for files of `zstd --long=31`
_MAX_XZ_MEMORY = 1 << 30
_HEAD = 1 << 16  # bytes that show whether a file of JSON has one value per line
_FIRST_VALUE = 64  # bytes of them that are enough if they are not blanks

_UTF8_MARK = codecs.BOM_UTF8
_MARKS = (  # UTF-32 first: its mark begins with the mark of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}  # a Zstandard file may begin with other frames
_VALUES_OVER_LINES = re.compile(rb"\s*(?:\[\s*[{\[\]]|\[[ \t]*\r?\n|\{[ \t]*\r?\n\s*[\"}])")
_BETWEEN = re.compile(r"[\s,\[\]]*")  # between two values of an array


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=_MAX_XZ_MEMORY),
}


class DamageError(Exception):
    """The rest of a file cannot be read."""


class ByteStream:
    """Iterator over the bytes of a file, unpacked and as UTF-8 without a byte order mark.

    Raises:
        DamageError: from the iteration, after all bytes before the damage.
    """

    def __init__(self, path: str, form: FileFormat) -> None:
        self._file = open_reader(path, _PACKED_READ)
        self._packing = form.packing
        self.tell = self._file.tell

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        if not self._packing:
            return _as_utf8(iter(lambda: self._file.read(_UNPACKED_PIECE), b""))
        return _as_utf8(self._unpacked())

    def lines(self, max_line_bytes: int) -> Iterator[bytes]:
        """Yield pieces of JSON lines; the values of an array, and values of several lines, get a line each."""
        pieces, head, damage = iter(self), list[bytes](), list[DamageError]()
        try:
            while sum(map(len, head)) < _HEAD and (piece := next(pieces, None)) is not None:
                head.append(piece)
                if len(piece.strip()) > _FIRST_VALUE:
                    break
        except DamageError as error:
            damage.append(error)

        def whole() -> Iterator[bytes]:
            yield from head
            if damage:
                raise damage[0]
            yield from pieces

        if _VALUES_OVER_LINES.match(b"".join(head)):
            yield from _value_lines(whole(), max_line_bytes)
        else:
            yield from whole()

    def _unpacked(self) -> Iterator[bytes]:
        magic = _MAGIC.get(self._packing, b"")
        begin = self._file.peek(len(magic))[: max(len(magic), 4)]
        if begin and not begin.startswith(magic):
            raise DamageError(
                f"it is no {self._packing} file, it begins with {begin!r}; if it is not packed, rename it without "
                f"{self._packing}"
            )
        try:
            yield from self._members()
        except (EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, ValueError) as error:
            if isinstance(error, OSError) and not is_path_error(error):
                raise  # the disk, not the content
            raise DamageError(str(error)) from error

    def _members(self) -> Iterator[bytes]:
        """Yield the content of one or more members or frames.

        The libraries' own file objects either lose the bytes read before a damaged place (gzip) or accept a truncated
        file as complete (zstandard).
        """
        new_member = _DECOMPRESSORS[self._packing]
        member: Any = None
        is_empty = True
        while raw := self._file.read(_ZSTD_READ if self._packing == ".zst" else _PACKED_READ):
            is_empty = False
            while raw:
                if member is None:
                    raw = raw.lstrip(b"\0")  # padding by zeros is allowed; no member and no frame begins with one
                    if not raw:
                        break
                    member = new_member()
                if self._packing == ".gz":  # unpack a piece at a time: a few packed bytes may hold a gigabyte
                    yield member.decompress(raw, _UNPACKED_PIECE)
                    raw = member.unconsumed_tail
                elif self._packing == ".zst":
                    yield member.decompress(raw)
                    raw = b""
                else:
                    yield member.decompress(raw, _UNPACKED_PIECE)
                    while not member.eof and not member.needs_input:
                        yield member.decompress(b"", _UNPACKED_PIECE)
                    raw = b""
                if member.eof:
                    raw, member = member.unused_data, None
        if member is not None or is_empty:
            raise EOFError("it ends in the middle of compressed data")


def needs_stream(path: str, form: FileFormat) -> bool:
    """Return whether a file cannot be entered in the middle: it is packed, not UTF-8, or has no value per line."""
    if form.packing:
        return True
    with open_reader(path) as file:
        head = file.read(_HEAD)
    is_utf8 = not any(head.startswith(mark) for mark, _ in _MARKS)
    return not is_utf8 or _VALUES_OVER_LINES.match(head.removeprefix(_UTF8_MARK)) is not None


def _as_utf8(pieces: Iterator[bytes]) -> Iterator[bytes]:
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= 4:
            break
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if encoding is None:
        if head:
            yield head.removeprefix(_UTF8_MARK)
        yield from pieces
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for piece in itertools.chain([head], pieces):
            yield decoder.decode(piece).encode()
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise DamageError(f"not {encoding.upper()}, which its first bytes say it is: {error}") from error


def _value_lines(pieces: Iterable[bytes], max_line_bytes: int) -> Iterator[bytes]:
    """Yield each value of JSON text on a line of its own; arrays around them are opened.

    Line ends inside of a value are blanks between its parts, because a JSON string cannot hold one. Example:
    b'[{"a": 1,\\n "b": 2},\\n{"a": 3}]' gives the lines b'{"a": 1,  "b": 2}' and b'{"a": 3}'.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    # Numbers are not needed here, and Python refuses to convert integers of more than 4,300 digits.
    parse = json.JSONDecoder(parse_int=str).raw_decode
    text, depth, number, wanted = "", 0, 1, 0
    for piece in itertools.chain(pieces, [None]):
        text += decoder.decode(piece or b"", final=piece is None)
        if len(text) < wanted and piece is not None:
            continue  # a long value is searched again only when its text has doubled
        at, lines = 0, list[bytes]()
        while True:
            between = _BETWEEN.match(text, at)
            assert between is not None
            depth += between[0].count("[") - between[0].count("]")
            at = between.end()
            if at == len(text):
                break
            try:
                _, end = parse(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                if piece is None or len(text) - at > max_line_bytes:
                    yield b"".join(lines)
                    raise DamageError(f"its JSON value {number} is cut off or invalid: {error}") from error
                break
            if end == len(text) and piece is not None:  # the next piece may belong to this number
                break
            value = text[at:end].replace("\n", " ").replace("\r", " ")
            lines.append(value.encode("utf-8", "surrogateescape") + b"\n")
            at, number = end, number + 1
        yield b"".join(lines)
        text = text[at:]
        wanted = 2 * len(text)
    if depth:
        raise DamageError("it ends inside of a JSON array")
