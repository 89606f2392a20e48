"""The input as a sequence of blocks: small pieces of work, always cut at the same places.

A block is named by its file and position, and both follow from the files alone, not from the number of workers, nodes
or restarts. So a run may stop after any block and go on with the next one, and nodes may take a range of blocks each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cpt.data.inputs import InputFiles, Shard
from megatron_cpt.data.jsonl import Lines, cut_stream, open_packed

BLOCK_BYTES = 1 << 21
MAX_LINE_BYTES = 1 << 26


@dataclass(frozen=True)
class BlockOptions:
    """How the input is cut; other values give other blocks.

    Attributes:
        keys: the texts that are wanted; for parquet also the columns that are read.
        block_bytes: about the size of a block.
        max_line_bytes: a longer line is a bad one and never held in memory.
    """

    keys: tuple[str, ...]
    block_bytes: int = BLOCK_BYTES
    max_line_bytes: int = MAX_LINE_BYTES


@dataclass(frozen=True)
class Cursor:
    """Where to go on: at the first block of `file` that begins at `position` or behind it.

    Attributes:
        file: number of the file.
        position: byte of the unpacked file, or row.
    """

    file: int = 0
    position: int = 0


@dataclass(frozen=True)
class Block:
    """A piece of a file: a byte range that the worker reads, lines that were unpacked, or rows of a parquet file.

    Attributes:
        file: number of the file.
        path: its path.
        position: where the block begins, in bytes of the unpacked file or in rows.
        end: where the next one begins.
        bytes_done: bytes on disk of all files up to its end.
        lines: the lines of a packed file.
        rows: the rows of a parquet file as an Arrow stream. With neither, the worker reads [position, end) itself.
        damage: why the file cannot be read beyond this block.
    """

    file: int
    path: str
    position: int
    end: int
    bytes_done: int
    lines: Lines | None = None
    rows: bytes | None = None
    damage: str | None = None

    @property
    def next_cursor(self) -> Cursor:
        """Behind this block."""
        return Cursor(self.file, self.end)


def read_blocks(
    files: InputFiles, options: BlockOptions, shard: Shard | None = None, start: Cursor | None = None
) -> Iterator[Block]:
    """All blocks of a shard, from a cursor on.

    A block belongs to the shard in which it begins. Packed files are not cut: all of their blocks begin where the file
    does.
    """
    first, last = (shard or Shard()).interval(files.total_bytes)
    start = start or Cursor()
    for number, path in enumerate(files.paths):
        base, file_end = files.starts[number : number + 2]
        if number < start.file or file_end <= first or base >= last:
            continue
        begin = start.position if number == start.file else 0
        if path.endswith(".parquet"):
            from megatron_cpt.data.parquet import parquet_blocks

            yield from parquet_blocks(number, path, (base, file_end), (first, last), options, begin)
        elif path.endswith((".gz", ".zst")):
            if first <= base < last:
                yield from _packed_blocks(number, path, base, options, begin)
        else:
            yield from _plain_blocks(number, path, (base, file_end), (first, last), options.block_bytes, begin)


def _plain_blocks(
    number: int, path: str, extent: tuple[int, int], interval: tuple[int, int], block_bytes: int, begin: int
) -> Iterator[Block]:
    base, file_end = extent
    low = max(begin, interval[0] - base, 0)
    for position in range(-(-low // block_bytes) * block_bytes, min(file_end, interval[1]) - base, block_bytes):
        end = min(position + block_bytes, file_end - base)
        yield Block(number, path, position, end, base + end)


def _packed_blocks(number: int, path: str, base: int, options: BlockOptions, begin: int) -> Iterator[Block]:
    with open_packed(path) as file:
        for cut in cut_stream(file, options.block_bytes, options.max_line_bytes):
            if cut.position >= begin:
                done = base + file.tell()
                yield Block(number, path, cut.position, cut.end, done, lines=cut.lines, damage=cut.damage)


def lines_before(block: Block, options: BlockOptions) -> int:
    """Line ends of a file before a block of it; only asked for when a bad line must be named and nobody has counted."""
    if block.path.endswith(".parquet"):
        return block.position
    count, left = 0, block.position
    with open(block.path, "rb") as file:
        while left > 0 and (piece := file.read(min(left, options.block_bytes))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count
