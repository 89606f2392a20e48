"""Input files of a run, the shard of them that this process reads, and the blocks that they are cut into.

The places where files are cut follow from the files alone, not from the number of workers, nodes or restarts. So a run
can stop after any block and resume with the next one, and each node can take a range of blocks.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_cpt.data.preprocess.jsonl import Lines, PackedFile, cut_stream
from megatron_cpt.errors import UserError

ENDINGS = (*(f"{ending}{packed}" for ending in (".jsonl", ".json") for packed in ("", ".gz", ".zst")), ".parquet")
BLOCK_BYTES = 1 << 21
MAX_LINE_BYTES = 1 << 26


@dataclass(frozen=True)
class InputFiles:
    """Input files, laid end to end.

    Attributes:
        starts: bytes on disk before each file, then the total, (files + 1,). Files of 10 and 20 bytes: [0, 10, 30].
    """

    paths: list[str]
    starts: list[int]

    @classmethod
    def of(cls, paths: Sequence[str]) -> InputFiles:
        """Read the sizes from the disk."""
        return cls(list(paths), [0, *accumulate(map(os.path.getsize, paths))])

    @property
    def total_bytes(self) -> int:
        """Size of all files on disk."""
        return self.starts[-1]

    def identity(self) -> list[list[str | int]]:
        """Return path, size and modification time in nanoseconds per file; a changed file has another identity."""
        stats = [(os.path.abspath(path), os.stat(path)) for path in self.paths]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


@dataclass(frozen=True)
class BlockOptions:
    """Settings that decide how the input is cut into blocks and lines.

    Attributes:
        keys: keys of the texts; for parquet also the columns that are read.
        block_bytes: approximate size of a block.
        max_line_bytes: a longer line counts as bad and is never held in memory.
    """

    keys: tuple[str, ...]
    block_bytes: int = BLOCK_BYTES
    max_line_bytes: int = MAX_LINE_BYTES


@dataclass(frozen=True)
class Cursor:
    """Place to resume at: the first block of file number `file` that begins at `position` or later.

    Attributes:
        position: byte of the unpacked file, or row.
    """

    file: int = 0
    position: int = 0


@dataclass(frozen=True)
class Block:
    """Small piece of a file: the unit of work, of resuming and of sharding.

    Packed files come with their unpacked lines, parquet files with their rows. With neither, the worker reads the bytes
    [position, end) itself.

    Attributes:
        position: first byte of the unpacked file, or first row.
        end: position of the next block.
        bytes_done: bytes on disk of all files up to the end of this block.
        rows: rows as an Arrow stream.
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
        """Cursor of the next block."""
        return Cursor(self.file, self.end)


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `count` parts of the input, each with the same number of bytes on disk."""

    index: int = 0
    count: int = 1

    def interval(self, total_bytes: int) -> tuple[int, int]:
        """Return the bytes [first, last) of all files laid end to end in which the blocks of this shard begin."""
        return total_bytes * self.index // self.count, total_bytes * (self.index + 1) // self.count


def expand_inputs(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the files named by paths, globs and folders: in the given order, sorted within a glob or folder.

    A folder stands for every file below it, at any depth, that has a known ending.

    Raises:
        UserError: a file is missing, unreadable or has an unknown ending, or a folder or glob is empty.
    """
    files: list[str] = []
    for name in inputs:
        entry = os.fspath(name)
        found = [entry] if os.path.exists(entry) else sorted(glob.glob(entry, recursive=True))
        if not found:
            raise UserError(f"input {entry}: no such file")
        for path in found:
            files += _files_of_folder(path) if os.path.isdir(path) else [path]
    for file in files:
        if not file.endswith(ENDINGS):
            raise UserError(f"input {file}: unknown ending; known endings are {', '.join(ENDINGS)}")
        if not os.access(file, os.R_OK):
            raise UserError(f"input {file}: no permission to read it; change its permissions")
    if not files:
        raise UserError("no input is given")
    return files


def _files_of_folder(folder: str) -> list[str]:
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    found = sorted(path for path in paths if path.endswith(ENDINGS))
    if not found:
        raise UserError(f"input {folder}: a folder without a file that ends in {', '.join(ENDINGS)}")
    return found


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """Read `i/n` (i from 0), or for `slurm` the variables of a SLURM array job, else of the tasks of `srun`.

    Raises:
        UserError: the text is neither, i is not below n, or SLURM's variables are not set.
    """
    if text == "slurm":
        return _slurm_shard(environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UserError(f"shard {text!r}: give i/n, such as 0/4, or slurm")
    index, count = int(match[1]), int(match[2])
    if index >= count:
        raise UserError(f"shard {text!r}: shards are counted from 0, so the last one of {count} is {count - 1}/{count}")
    return Shard(index, count)


def _slurm_shard(environment: Mapping[str, str]) -> Shard:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    try:
        if names[0] in environment:
            task, low, high, count = (int(environment[name]) for name in names)
            step = (high - low) // (count - 1) if count > 1 else 1  # --array=0-30:10 counts 0, 10, 20, 30
            if (high - low) != step * (count - 1):
                raise UserError("shard slurm: the array's numbers are not evenly spaced; use --array=0-N")
            return Shard((task - low) // step, count)
        return Shard(int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]))
    except KeyError as error:
        raise UserError(f"shard slurm: {error.args[0]} is not set; start it with srun or sbatch --array") from error


def read_blocks(
    files: InputFiles, options: BlockOptions, shard: Shard | None = None, start: Cursor | None = None
) -> Iterator[Block]:
    """Yield the blocks of a shard, from a cursor on.

    A block belongs to the shard in which it begins. Packed files cannot be entered in the middle, so all their blocks
    belong to the shard in which the file begins.
    """
    first, last = (shard or Shard()).interval(files.total_bytes)
    start = start or Cursor()
    for number, path in enumerate(files.paths):
        base, file_end = files.starts[number : number + 2]
        if number < start.file or file_end <= first or base >= last:
            continue
        begin = start.position if number == start.file else 0
        if path.endswith(".parquet"):
            from megatron_cpt.data.preprocess.parquet import cut_rows

            settings = (options.keys, options.block_bytes, begin)
            for position, end, done, rows, damage in cut_rows(path, (base, file_end), (first, last), *settings):
                yield Block(number, path, position, end, done, rows=rows, damage=damage)
        elif not path.endswith((".gz", ".zst")):
            # Cut at multiples of `block_bytes`; the lines of a block are those that begin in it (`read_range`).
            step, low = options.block_bytes, max(begin, first - base, 0)
            for position in range(-(-low // step) * step, min(file_end, last) - base, step):
                end = min(position + step, file_end - base)
                yield Block(number, path, position, end, base + end)
        elif first <= base < last:
            with PackedFile(path) as file:
                for cut in cut_stream(file, options.block_bytes, options.max_line_bytes):
                    if cut.position >= begin:
                        done = base + file.tell()
                        yield Block(number, path, cut.position, cut.end, done, lines=cut.lines, damage=cut.damage)


def lines_before(block: Block, options: BlockOptions) -> int:
    """Count the line ends of a file before a block; needed only to number a bad line of a shard's first file."""
    if block.path.endswith(".parquet"):
        return block.position
    count, left = 0, block.position
    with open(block.path, "rb") as file:
        while left > 0 and (piece := file.read(min(left, options.block_bytes))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count
