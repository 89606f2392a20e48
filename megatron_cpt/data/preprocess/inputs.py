"""Which files are read, and which part of them this process reads."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_cpt.errors import UserError

JSONL_ENDINGS = tuple(f"{ending}{packed}" for ending in (".jsonl", ".json") for packed in ("", ".gz", ".zst"))
ENDINGS = (*JSONL_ENDINGS, ".parquet")


def expand_inputs(inputs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files that paths, globs and folders name, in the order given; those of a glob or a folder sorted.

    A folder stands for every file below it whose ending is known, however deep.

    Raises:
        UserError: a file is missing, may not be read or has an ending that is not known, or a folder or glob is empty.
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
            raise UserError(f"input {file}: its ending is not known; known are {', '.join(ENDINGS)}")
        if not os.access(file, os.R_OK):
            raise UserError(f"input {file}: may not be read; change its permissions")
    if not files:
        raise UserError("no input is given")
    return files


def _files_of_folder(folder: str) -> list[str]:
    found = sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(ENDINGS)
    )
    if not found:
        raise UserError(f"input {folder}: a folder with no file that ends in {', '.join(ENDINGS)}")
    return found


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of the input, in equal numbers of bytes on disk; the parts in order are the input.

    Attributes:
        index: from 0.
        count: parts in all.
    """

    index: int = 0
    count: int = 1

    def interval(self, total_bytes: int) -> tuple[int, int]:
        """The bytes [first, last) of all files together in which this part's blocks begin."""
        return total_bytes * self.index // self.count, total_bytes * (self.index + 1) // self.count


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """Reads `i/n` (i from 0), or with `slurm` the variables of a SLURM array job or, without one, of `srun`'s tasks.

    Raises:
        UserError: neither of these, i is not below n, or SLURM's variables are not there.
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


@dataclass(frozen=True)
class InputFiles:
    """The files of a run, laid end to end.

    Attributes:
        paths: in reading order.
        starts: bytes on disk of the files before each one, and of all of them at the end, (files + 1,).
    """

    paths: list[str]
    starts: list[int]

    @classmethod
    def of(cls, paths: Sequence[str]) -> InputFiles:
        """Asks the disk for the sizes."""
        return cls(list(paths), [0, *accumulate(map(os.path.getsize, paths))])

    @property
    def total_bytes(self) -> int:
        """Size of all files on disk."""
        return self.starts[-1]

    def identity(self) -> list[list[str | int]]:
        """What tells that the files are still the same: path, size, time of last change in nanoseconds."""
        stats = [(os.path.abspath(path), os.stat(path)) for path in self.paths]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
