"""Read the lines of JSONL files in bounded memory: byte ranges of plain files, and streams of all others."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_cpt.data.preprocess.streams import DamageError
from megatron_cpt.files.whole_io import DiskFile

_TAIL_READ = 1 << 18
_READ_AHEAD = 1 << 16  # bytes after a range


@dataclass(frozen=True)
class Lines:
    """Whole lines of a range of a file: the lines that begin in the range.

    Example: the file b"ab\\ncd\\nef" in ranges of 4 bytes. Range [0, 4) holds the lines ab and cd, although cd ends
    in the next range. Range [4, 8) holds ef; its `skipped` is 1, the end of cd.

    Attributes:
        data: bytes that hold the lines; bytes before `begin` and from `end` on belong to other lines.
        skipped: line ends of the range that belong to a line of an earlier range.
        num_ends: line ends in the range.
        is_overlong: whether these lines are followed by one that is too long and skipped.
        begin: first byte of the first line.
        end: end of the last line, with or without its newline; None: the end of the data.
    """

    data: bytes
    skipped: int
    num_ends: int
    is_overlong: bool = False
    begin: int = 0
    end: int | None = None

    def __iter__(self) -> Iterator[memoryview]:
        """Yield each line without its newline, not copied."""
        view, find = memoryview(self.data), self.data.find
        at, end = self.begin, len(self.data) if self.end is None else self.end
        while at < end:
            stop = find(b"\n", at, end)
            if stop < 0:
                stop = end
            yield view[at:stop]
            at = stop + 1


def read_range(path: str, start: int, end: int, max_line_bytes: int) -> Lines:
    """Read the lines of a plain file that begin in [start, end); the last one may end after `end`."""
    before = 1 if start > 0 else 0  # read one byte more: a newline there means that a line begins at `start`
    with DiskFile(path) as file:
        # Read ahead what the last line is likely to need: appending it later would copy the block.
        data = file.read_at(start - before, before + end - start + _READ_AHEAD)
        limit = min(before + end - start, len(data))  # end of the range in `data`
        begin = data.find(b"\n", 0, limit) + 1 if before else _mark_bytes(data)
        num_ends = _count_ends(data, before, limit)
        skipped = 1 if before and begin != 1 else 0
        if (before and begin == 0) or begin == limit:
            return Lines(b"", skipped, num_ends)
        last = max(begin, data.rfind(b"\n", begin, limit) + 1)  # begin of the line that does not end in the range
        if last == limit:
            return Lines(data, skipped, num_ends, begin=begin, end=limit)
        stop = data.find(b"\n", limit)
        is_overlong = stop - last > max_line_bytes
        if stop < 0:
            most = last + max_line_bytes - len(data)
            rest, is_overlong = _rest_of_line(file, start - before + len(data), most)
            data += rest
            stop = len(data)
    return Lines(data, skipped, num_ends, is_overlong, begin, last if is_overlong else stop)


def _mark_bytes(data: bytes) -> int:
    return len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0


def _count_ends(data: bytes, begin: int, end: int) -> int:
    """Count line ends in a part of the data; `bytes.count` takes nearly twice as long."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8)[begin:end] == ord("\n")))


def _rest_of_line(file: DiskFile, start: int, most: int) -> tuple[bytes, bool]:
    """Return the rest of a line from a byte on, and whether it is longer than `most`."""
    pieces, size = list[bytes](), 0
    while size <= most and (piece := file.read_at(start + size, _TAIL_READ)):
        end = piece.find(b"\n") + 1
        pieces.append(piece[:end] if end else piece)
        size += len(pieces[-1])
        if end:
            break
    rest = b"".join(pieces)
    return rest, len(rest.removesuffix(b"\n")) > most


@dataclass(frozen=True)
class Cut:
    """Block of a stream: the lines of its unpacked bytes [position, end), and the damage found after them."""

    position: int
    end: int
    lines: Lines
    damage: str | None = None


def cut_stream(pieces: Iterable[bytes], block_bytes: int, max_line_bytes: int) -> Iterator[Cut]:
    """Cut unpacked bytes into blocks of whole lines of about `block_bytes`; a line that is too long is its own block.

    A truncated or corrupt file gives the whole lines before the damage, and its last block carries the error. (If only
    a checksum reveals the damage, it lies earlier, because a checksum follows the data it covers.)
    """
    position, pending, size = 0, list[bytes](), 0
    open_line = 0  # bytes of the last line, which has not ended yet
    unpacked = iter(pieces)
    damage: str | None = None
    while True:
        try:
            piece = next(unpacked)
        except StopIteration:
            break
        except DamageError as error:
            damage = str(error)
            break
        if open_line > max_line_bytes:
            ends = piece.find(b"\n") + 1
            if ends == 0:
                size += len(piece)
                continue
            yield Cut(position, position + size + ends, Lines(b"", 0, 1, is_overlong=True))
            position, size, open_line, piece = position + size + ends, 0, 0, piece[ends:]
        # Search only the new piece; otherwise a line of many blocks would be searched again for each of them.
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
    data = b"".join(pending)
    if damage is not None:
        cut = _whole_lines(position, data[: data.rfind(b"\n") + 1])
        yield replace(cut, end=cut.end + 1, damage=damage)  # so that a run that resumes after this block finds nothing
    elif open_line > max_line_bytes:
        yield Cut(position, position + size, Lines(b"", 0, 0, is_overlong=True))
    elif data:
        yield _whole_lines(position, data)


def _whole_lines(position: int, data: bytes) -> Cut:
    return Cut(position, position + len(data), Lines(data, 0, _count_ends(data, 0, len(data))))
