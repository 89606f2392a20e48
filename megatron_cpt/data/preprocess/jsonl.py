"""Lines of JSONL files: byte ranges of plain ones, streams of gzip and Zstandard ones, in bounded memory."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

_PACKED_READ = 1 << 18  # smaller than a block, for it grows when it is unpacked
_ZSTD_READ = 1 << 10  # a block of a frame has at least 4 bytes and gives at most 128 KiB, so 32 MiB at a time
_UNPACKED_PIECE = 1 << 20
_TAIL_READ = 1 << 18
_READ_ALONG = 1 << 16  # bytes behind a range
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` needs


@dataclass(frozen=True)
class Lines:
    """Whole lines.

    Attributes:
        data: bytes that hold the lines; what stands before `begin` and from `end` on belongs to other lines.
        skipped: line ends of the range before the first of these lines; their lines began in an earlier range.
        num_ends: line ends in the whole range.
        overlong: whether these lines are followed by one that is too long and left out.
        begin: where the first line begins.
        end: where the last one ends, with or without its newline; None: with the data.
    """

    data: bytes
    skipped: int
    num_ends: int
    overlong: bool = False
    begin: int = 0
    end: int | None = None

    def __iter__(self) -> Iterator[memoryview]:
        """Each line without its newline, not copied."""
        view, find = memoryview(self.data), self.data.find
        at, end = self.begin, len(self.data) if self.end is None else self.end
        while at < end:
            stop = find(b"\n", at, end)
            if stop < 0:
                stop = end
            yield view[at:stop]
            at = stop + 1


def read_range(path: str, start: int, end: int, max_line_bytes: int) -> Lines:
    """The lines of a plain file that begin in [start, end); the last of them may reach behind `end`."""
    before = 1 if start > 0 else 0  # the byte that tells whether a line begins at `start`
    with open(path, "rb", buffering=0) as file:
        # What the last line is likely to need is read along: put behind it later, it would cost a copy of the block.
        data = os.pread(file.fileno(), before + end - start + _READ_ALONG, start - before)
        limit = min(before + end - start, len(data))  # of the range, in `data`
        begin = data.find(b"\n", 0, limit) + 1 if before else 0
        num_ends = _count_ends(data, before, limit)
        skipped = 1 if before and begin != 1 else 0
        if (before and begin == 0) or begin == limit:
            return Lines(b"", skipped, num_ends)
        last = max(begin, data.rfind(b"\n", begin, limit) + 1)  # where a line begins that does not end in the range
        if last == limit:
            return Lines(data, skipped, num_ends, begin=begin, end=limit)
        stop = data.find(b"\n", limit)
        overlong = stop - last > max_line_bytes
        if stop < 0:
            most = last + max_line_bytes - len(data)
            rest, overlong = _rest_of_line(file.fileno(), start - before + len(data), most)
            data += rest
            stop = len(data)
    return Lines(data, skipped, num_ends, overlong, begin, last if overlong else stop)


def _count_ends(data: bytes, begin: int, end: int) -> int:
    """Line ends in a part of the data; `bytes.count` looks at each byte alone and takes nearly twice as long."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8)[begin:end] == ord("\n")))


def _rest_of_line(fd: int, start: int, most: int) -> tuple[bytes, bool]:
    """What is left of a line from a byte on, and whether that is more than `most`."""
    pieces, size = list[bytes](), 0
    while size <= most and (piece := os.pread(fd, _TAIL_READ, start + size)):
        end = piece.find(b"\n") + 1
        pieces.append(piece[:end] if end else piece)
        size += len(pieces[-1])
        if end:
            break
    rest = b"".join(pieces)
    return rest, len(rest.removesuffix(b"\n")) > most


@dataclass(frozen=True)
class Cut:
    """A block of a packed file: the lines of its unpacked bytes [position, end), and what is wrong behind them."""

    position: int
    end: int
    lines: Lines
    damage: str | None = None


class PackedFile:
    """A gzip or Zstandard file as pieces of unpacked bytes.

    The libraries' own file objects either lose what was read before a damage (gzip) or take a cut file for a whole one
    (zstandard).
    """

    def __init__(self, file: BinaryIO, is_gzip: bool) -> None:
        self._file = file
        self._is_gzip = is_gzip
        self._read_bytes = _PACKED_READ if is_gzip else _ZSTD_READ
        self._new_member: Callable[[], Any] = lambda: zlib.decompressobj(wbits=31)
        if not is_gzip:
            self._new_member = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj
        self.tell = file.tell

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        member: Any = None
        while raw := self._file.read(self._read_bytes):
            while raw:
                if member is None:
                    raw = raw.lstrip(b"\0")  # gzip allows zeros to pad the end; no member and no frame begins with one
                    if not raw:
                        break
                    member = self._new_member()
                unpacked, raw = self._unpack(member, raw)
                yield unpacked
                if member.eof:
                    raw, member = member.unused_data, None
        if member is not None:
            raise EOFError("it ends in the middle of compressed data")

    def _unpack(self, member: Any, raw: bytes) -> tuple[bytes, bytes]:
        """Some unpacked bytes, and what was not read yet: a few packed bytes may stand for a gigabyte."""
        if not self._is_gzip:
            return member.decompress(raw), b""
        return member.decompress(raw, _UNPACKED_PIECE), member.unconsumed_tail


def open_packed(path: str) -> PackedFile:
    """Opens a .gz or .zst file of one or more members or frames."""
    file = Path(path).open("rb", buffering=_PACKED_READ)  # noqa: SIM115 (closed by PackedFile)
    return PackedFile(file, path.endswith(".gz"))


def cut_stream(pieces: PackedFile, block_bytes: int, max_line_bytes: int) -> Iterator[Cut]:
    """Cuts unpacked bytes into blocks of whole lines of about `block_bytes`; a line that is too long is one by itself.

    A file that is cut or damaged gives the whole lines that could be unpacked; its last block says what is wrong, and
    the line behind its lines is where. (A checksum is met at the end of what it is of: where only it tells of the
    damage, the damage lies before.)
    """
    position, pending, size = 0, list[bytes](), 0
    open_line = 0  # bytes of the line that has not ended yet
    unpacked = iter(pieces)
    damage: str | None = None
    while True:
        try:
            piece = next(unpacked, None)
        except (EOFError, zlib.error, zstandard.ZstdError) as error:
            damage = f"the file is cut or damaged: {error}"
            break
        if piece is None:
            break
        if open_line > max_line_bytes:
            ends = piece.find(b"\n") + 1
            if ends == 0:
                size += len(piece)
                continue
            yield Cut(position, position + size + ends, Lines(b"", 0, 1, overlong=True))
            position, size, open_line, piece = position + size + ends, 0, 0, piece[ends:]
        # Only the new piece is searched: a line of many blocks would else be searched again for each.
        ends = piece.rfind(b"\n") + 1
        open_line = len(piece) - ends if ends else open_line + len(piece)
        pending.append(piece)
        size += len(piece)
        if open_line > max_line_bytes or (ends and size - open_line >= block_bytes):
            data = b"".join(pending)
            whole = size - open_line
            if whole:
                yield _whole_lines(position, data[:whole])
            position, size = position + whole, open_line
            pending = [] if open_line > max_line_bytes else [data[whole:]]
    yield from _last_cut(position, size, b"".join(pending), damage, open_line > max_line_bytes)


def _whole_lines(position: int, data: bytes) -> Cut:
    return Cut(position, position + len(data), Lines(data, 0, _count_ends(data, 0, len(data))))


def _last_cut(position: int, size: int, data: bytes, damage: str | None, overlong: bool) -> Iterator[Cut]:
    if damage is not None:
        data = data[: data.rfind(b"\n") + 1]
        # one byte more, so that going on behind this block finds nothing
        yield Cut(position, position + len(data) + 1, Lines(data, 0, _count_ends(data, 0, len(data))), damage)
    elif overlong:
        yield Cut(position, position + size, Lines(b"", 0, 0, overlong=True))
    elif data:
        yield _whole_lines(position, data)
