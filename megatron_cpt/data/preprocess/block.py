"""A block: one small piece of the input, and the unit of work, restart and sharding."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.data.preprocess.jsonl import Lines

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
