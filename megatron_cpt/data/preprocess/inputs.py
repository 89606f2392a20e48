"""Input files of a run, the shard of them that this process reads, and the blocks that they are cut into.

The places where files are cut follow from the files alone, not from the number of workers, nodes or restarts. So a run
can stop after any block and resume with the next one, and each node can take a range of blocks.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from megatron_cpt.data.preprocess.file_format import KNOWN, FileFormat, convert_hint, find_format, name_files
from megatron_cpt.data.preprocess.jsonl import Lines, cut_stream
from megatron_cpt.data.preprocess.streams import ByteStream, needs_stream
from megatron_cpt.data.preprocess.tables import cut_document, cut_table
from megatron_cpt.data.tokenfile.sidecar import is_sidecar
from megatron_cpt.errors import UserError
from megatron_cpt.files.whole_io import exists, is_folder, open_reader, open_writer

BLOCK_BYTES = 1 << 21
MAX_LINE_BYTES = 1 << 26
BAD_LINES_ENDING = ".bad.jsonl"
_LISTED_LINE = 64  # bytes at the beginning of a list of bad lines
_STDIN_MAGIC = {
    b"\x1f\x8b": ".jsonl.gz",
    b"\x28\xb5\x2f\xfd": ".jsonl.zst",
    b"BZh": ".jsonl.bz2",
    b"\xfd7zXZ\0": ".jsonl.xz",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
}
_DATASETS_FILES = frozenset({"state.json", "dataset_info.json", "dataset_dict.json"})


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

    def empty_archives(self) -> list[str]:
        """Return the files of 0 bytes whose format needs some; they have no block."""
        sizes = (end - start for start, end in pairwise(self.starts))
        formats = ((path, find_format(path)) for path, size in zip(self.paths, sizes, strict=True) if size == 0)
        return [path for path, form in formats if form and (form.packing or form.kind in ("parquet", "arrow"))]

    def identity(self) -> list[list[str | int]]:
        """Return path, size and modification time in nanoseconds per file; a changed file has another identity."""
        stats = [(os.path.abspath(path), os.stat(path)) for path in self.paths]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


@dataclass(frozen=True)
class BlockOptions:
    """Settings that decide how the input is cut into blocks and lines.

    Attributes:
        keys: keys of the texts; for tables, parquet and Arrow also the columns that are read. `meta.text` is the key
            `text` of the object `meta`, unless there is a key of that whole name; `parts.0` is the first of a list.
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

    Streams come with their lines, parquet and Arrow files with their rows, tables with the values of each key. With
    none of these, the worker reads the bytes [position, end) itself.

    Attributes:
        position: first byte of the unpacked file, or first row.
        end: position of the next block.
        bytes_done: bytes on disk of all files up to the end of this block.
        rows: rows as an Arrow stream.
        values: values per key, one per row.
        damage: why the file cannot be read beyond this block.
    """

    file: int
    path: str
    position: int
    end: int
    bytes_done: int
    lines: Lines | None = None
    rows: bytes | None = None
    values: list[list[Any]] | None = None
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


def expand_inputs(
    inputs: Sequence[str | os.PathLike[str]], notify: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Return the files named by paths, globs and folders: in the given order, sorted within a glob or folder.

    A folder stands for every file below it, at any depth, that has a known ending; .txt files only if it holds no other
    kind. Files that `preprocess` itself writes are never read from a folder or a glob: work folders, lists of bad
    lines, datasets and their sidecars.

    Args:
        notify: called with a sentence that names the files of a folder that are not read.

    Raises:
        UserError: a file is missing, unreadable or has an unknown ending, or a folder or glob is empty.
    """
    files: list[str] = []
    for name in inputs:
        entry = os.fspath(name)
        if is_folder(entry):
            files += _files_of_folder(entry, notify)
            continue
        found = [entry] if exists(entry) else sorted(glob.glob(entry, recursive=True))
        if not found:
            raise UserError(f"input {entry}: no such file")
        if found != [entry]:
            found = [path for path in found if not _is_own(path)]
        for path in found:
            files += _files_of_folder(path, notify) if is_folder(path) else [path]
    for file in files:
        if find_format(file) is None:
            raise UserError(f"input {file}: unknown ending; {convert_hint(file)} (known endings are {KNOWN})")
        if _is_own(file):
            raise UserError(f"input {file}: is a file that preprocess wrote, not a file of documents; do not give it")
        if not exists(file):
            raise UserError(f"input {file}: a link to a file that does not exist; remove it or restore the file")
        if not os.access(file, os.R_OK):
            raise UserError(f"input {file}: no permission to read it; change its permissions")
    if not files:
        raise UserError("no input is given")
    return files


@contextlib.contextmanager
def spool_stdin(
    inputs: Sequence[str | os.PathLike[str]], prefix: str
) -> Iterator[tuple[list[str | os.PathLike[str]], bool]]:
    """Copy standard input, named "-", to a file beside the output, because blocks may be read more than once.

    Yields:
        The inputs with the file in place of "-", and whether there was one. The file is removed at the end.
    """
    names = [os.fspath(name) for name in inputs]
    if "-" not in names:
        yield list(inputs), False
        return
    stream = sys.stdin.buffer
    begin = stream.read(8)
    ending = next((ending for magic, ending in _STDIN_MAGIC.items() if begin.startswith(magic)), ".jsonl")
    spool = f"{prefix}.stdin{ending}"
    os.makedirs(os.path.dirname(spool) or ".", exist_ok=True)
    try:
        with open_writer(spool) as file:
            file.write(begin)
            shutil.copyfileobj(stream, file, 1 << 20)
        yield [spool if name == "-" else name for name in names], True
    finally:
        Path(spool).unlink(missing_ok=True)


def _files_of_folder(folder: str, notify: Callable[[str], None]) -> list[str]:
    paths: list[str] = []
    seen = set[str]()  # a link may lead to a folder around it, or to one that is read under another name
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in sorted(folders) if not _is_own(os.path.join(parent, name))]
        # A folder that `datasets` has saved: some of its JSON files only describe the Arrow files.
        is_dataset = "dataset_dict.json" in names or any(name.endswith(".arrow") for name in names)
        about = _DATASETS_FILES if is_dataset else frozenset()
        candidates = (os.path.join(parent, name) for name in names if name not in about)
        paths += [path for path in candidates if not _is_own(path)]
    formats = {path: find_format(path) for path in sorted(paths)}
    found = [path for path, form in formats.items() if form is not None and form.kind != "text"]
    found = found or [path for path, form in formats.items() if form is not None]
    others = [path for path in formats if path not in set(found)]
    if not found:
        hint = f"; {convert_hint(others[0])}" if others else ""
        raise UserError(f"input {folder}: a folder without a file that ends in {KNOWN}{hint}")
    if others:
        notify(f"not read from {folder}, {len(others)} files: {name_files(others)}")
    return found


def _is_own(path: str) -> bool:
    """Return whether `preprocess` wrote a file or folder, in this run or an earlier one."""
    ending = os.path.splitext(path)[1]
    if is_folder(path):
        return re.search(r"\.preprocess(-\d+-of-\d+)?$", path) is not None
    if not os.access(path, os.R_OK):
        return False
    if path.endswith(BAD_LINES_ENDING):
        with open_reader(path) as file:
            return file.readline(_LISTED_LINE).startswith(b'{"file":')
    if ending == ".json":
        return is_sidecar(path)
    return ending in (".bin", ".idx") or re.search(r"/\..*\.preprocess.*\.lock$", f"/{path}") is not None


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

    A block belongs to the shard in which it begins. Only plain JSON lines and parquet files can be entered in the
    middle; all blocks of other files belong to the shard in which the file begins.
    """
    first, last = (shard or Shard()).interval(files.total_bytes)
    start = start or Cursor()
    for number, path in enumerate(files.paths):
        base, file_end = files.starts[number : number + 2]
        if number < start.file or file_end <= first or base >= last:
            continue
        begin = start.position if number == start.file else 0
        form = find_format(path)
        assert form is not None
        if form.kind == "parquet":
            from megatron_cpt.data.preprocess.parquet import cut_rows

            settings = (options.keys, options.block_bytes, begin)
            for position, end, done, rows, damage in cut_rows(path, (base, file_end), (first, last), *settings):
                yield Block(number, path, position, end, done, rows=rows, damage=damage)
        elif form.kind == "lines" and not needs_stream(path, form):
            # Cut at multiples of `block_bytes`; the lines of a block are those that begin in it (`read_range`).
            step, low = options.block_bytes, max(begin, first - base, 0)
            for position in range(-(-low // step) * step, min(file_end, last) - base, step):
                end = min(position + step, file_end - base)
                yield Block(number, path, position, end, base + end)
        elif first <= base < last:
            yield from (block for block in _stream_blocks(number, files, options, form) if block.position >= begin)


def _stream_blocks(number: int, files: InputFiles, options: BlockOptions, form: FileFormat) -> Iterator[Block]:
    """Yield the blocks of a file that is read from its beginning."""
    path, base, file_end = files.paths[number], *files.starts[number : number + 2]
    if form.kind == "arrow":
        from megatron_cpt.data.preprocess.parquet import cut_batches

        for position, end, done, rows, damage in cut_batches(path, (base, file_end), options.keys, options.block_bytes):
            yield Block(number, path, position, end, done, rows=rows, damage=damage)
        return
    with ByteStream(path, form) as stream:
        if form.kind == "lines":
            lines = stream.lines(options.max_line_bytes)
            for cut in cut_stream(lines, options.block_bytes, options.max_line_bytes):
                done = base + stream.tell()
                yield Block(number, path, cut.position, cut.end, done, lines=cut.lines, damage=cut.damage)
            return
        if form.kind == "text":
            cuts = cut_document(path, stream, options.keys, options.max_line_bytes)
        else:
            cuts = cut_table(path, stream, form, options.keys, options.block_bytes, options.max_line_bytes)
        for rows_cut in cuts:
            done = base + stream.tell()
            yield Block(
                number, path, rows_cut.position, rows_cut.end, done, values=rows_cut.values, damage=rows_cut.damage
            )


def lines_before(block: Block, options: BlockOptions) -> int:
    """Count the line ends of a file before a block; needed only to number a bad line of a shard's first file."""
    if block.rows is not None or block.values is not None or find_format(block.path) == FileFormat("parquet"):
        return block.position
    count, left = 0, block.position
    with open_reader(block.path) as file:
        while left > 0 and (piece := file.read(min(left, options.block_bytes))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count
