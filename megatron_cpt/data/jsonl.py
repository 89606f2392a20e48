"""JSONL files as blocks of whole lines: plain, gzip or Zstandard, in bounded memory (the longest line apart)."""

from __future__ import annotations

import glob
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron_cpt.errors import UserError

BLOCK_BYTES = 1 << 20
_ENDINGS = tuple(f"{ending}{packed}" for ending in (".jsonl", ".json") for packed in ("", ".gz", ".zst"))
_COMPRESSED_READ = 1 << 18  # a smaller read, for it grows when it is unpacked
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` needs


@dataclass(frozen=True)
class Block:
    """Some whole lines of a file.

    Attributes:
        path: the file.
        first_line: number of the first line, from 1.
        data: the lines, the last one with or without its newline.
        bytes_done: bytes of the file (as it lies on disk) that were read so far.
        damage: why the file cannot be read beyond these lines; None as long as it can.
    """

    path: str
    first_line: int
    data: bytes
    bytes_done: int
    damage: str | None = None


def expand_inputs(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files that paths and globs name, in the order given, a glob's in sorted order.

    Raises:
        UserError: a file is missing, is a folder or has an ending that is not known, or a glob matches nothing.
    """
    files: list[str] = []
    for name in inputs:
        entry = os.fspath(name)
        found = [entry] if os.path.exists(entry) else sorted(glob.glob(entry, recursive=True))
        if not found:
            raise UserError(f"input {entry}: no such file")
        files += found
    for file in files:
        if os.path.isdir(file):
            raise UserError(f"input {file}: is a folder; name its files, for example {file}/*.jsonl")
        if not file.endswith(_ENDINGS):
            raise UserError(f"input {file}: its ending is not known; known are {', '.join(_ENDINGS)}")
    if not files:
        raise UserError("no input is given")
    return files


def read_blocks(path: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cuts a file into blocks of whole lines of about `block_bytes`.

    A compressed file that is cut or damaged gives the whole lines that could be unpacked; its last block says what is
    wrong, and the line after its lines is where. (A checksum is met at the end of what it is of: where only it tells
    of the damage, the damage lies before.)

    Raises:
        UserError: the file may not be read.
    """
    line, pending, size = 1, list[bytes](), 0
    damage = None
    try:
        file = Path(path).open("rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"input {path}: {error.strerror}") from error
    with file:
        pieces = _pieces(file, path, block_bytes)
        while True:
            try:
                piece = next(pieces, None)
            except (EOFError, zlib.error, zstandard.ZstdError) as error:
                damage = f"the file is cut or damaged: {error}"
                break
            if piece is None:
                break
            # Only the new piece is searched: a line of many blocks would else be searched again for each.
            end = piece.rfind(b"\n") + 1
            if end == 0 or size + end < block_bytes:
                pending.append(piece)
                size += len(piece)
                continue
            data = b"".join([*pending, piece[:end]])
            yield Block(path, line, data, file.tell())
            line += data.count(b"\n")
            pending, size = [piece[end:]], len(piece) - end
        data = b"".join(pending)
        if damage is not None:
            data = data[: data.rfind(b"\n") + 1]
        if data or damage is not None:
            yield Block(path, line, data, os.path.getsize(path), damage)


def _pieces(file: BinaryIO, path: str, block_bytes: int) -> Iterator[bytes]:
    if path.endswith(".gz"):
        return _unpack(file, lambda: zlib.decompressobj(wbits=31))
    if path.endswith(".zst"):
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        return _unpack(file, decompressor.decompressobj)
    return iter(lambda: file.read(block_bytes), b"")


def _unpack(file: BinaryIO, new_member: Callable[[], Any]) -> Iterator[bytes]:
    """Decompresses a file of one or more gzip members or zstd frames.

    The libraries' own file objects either lose what was read before the damage (gzip) or take a cut file for a whole
    one (zstandard).
    """
    member = None
    while raw := file.read(_COMPRESSED_READ):
        while raw:
            if member is None:
                raw = raw.lstrip(b"\0")  # gzip allows zeros to pad the end; no member and no frame begins with one
                if not raw:
                    break
                member = new_member()
            yield member.decompress(raw)
            raw = member.unused_data if member.eof else b""
            if member.eof:
                member = None
    if member is not None:
        raise EOFError("it ends in the middle of compressed data")
