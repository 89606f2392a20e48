"""Record bad lines and damaged files, count them, and refuse too many."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from megatron_cpt.data.preprocess.file_format import FileFormat, find_format
from megatron_cpt.data.preprocess.inputs import Block, BlockOptions, lines_before
from megatron_cpt.data.preprocess.work_folder import WorkFolder
from megatron_cpt.data.preprocess.workers import EncodedBlock
from megatron_cpt.errors import RefusedError, UserError

FILE = "bad.jsonl"
_SHOWN = 5  # bad lines in an error message
_MOST_KINDS = 20

DEFAULT_FRACTION = 0.001
FREE_LINES, FREE_BYTES = 10, 1_000_000


@dataclass(frozen=True)
class MaxBad:
    """Limit on bad lines; None: no limit.

    Bytes count as well as lines: an array of 5,000 documents may be a single line.

    Attributes:
        count: most bad lines.
        fraction: largest share of all lines and of all bytes; it is checked once all lines are read.
        free_lines: with `fraction`, so many bad lines are always accepted.
        free_bytes: with `fraction`, bad lines of so many bytes are always accepted.
    """

    count: int | None = None
    fraction: float | None = None
    free_lines: int = 0
    free_bytes: int = 0

    def check(self, log: BadLineLog, *, is_complete: bool) -> None:
        """Raise a RefusedError if there are too many bad lines; a share is checked when all lines are read."""
        if self.count is not None and log.count > self.count:
            raise RefusedError(f"nothing is written: more than {self.count} bad lines ({log.summary()})")
        if self.fraction is None or not is_complete:
            return
        for unit, bad, total, free in (
            ("lines", log.count, log.num_lines, self.free_lines),
            ("bytes", log.bad_bytes, log.num_bytes, self.free_bytes),
        ):
            if bad > free and bad > self.fraction * total:
                raise RefusedError(
                    f"nothing is written: {bad} of {total} {unit} are bad, more than {self.fraction:.4%} "
                    f"({log.summary()}); raise --max-bad to accept them"
                )


def parse_max_bad(value: str | int | None) -> MaxBad:
    """Read a number of lines (100) or a share of all lines and bytes ("0.1%"); None: the default.

    Raises:
        UserError: the value is neither.
    """
    if value is None:
        return MaxBad(fraction=DEFAULT_FRACTION, free_lines=FREE_LINES, free_bytes=FREE_BYTES)
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", str(value).strip())
    if match is None or (match[2] and float(match[2]) > 100):
        raise UserError(f"max-bad {value!r}: give a number of lines, such as 100, or a share of them, such as 0.1%")
    return MaxBad(int(match[1])) if match[1] else MaxBad(fraction=float(match[2]) / 100)


@dataclass
class BadLineLog:
    """Bad lines and damaged files so far; saved with the state.

    Attributes:
        count: bad lines.
        num_lines: lines that are not blank, bad ones included.
        bad_bytes: size of the bad lines.
        num_bytes: size of all lines.
        reasons: number of bad lines per kind of reason.
        damaged: sentence per file that could not be read to its end.
        first: the first few bad lines, for messages.
        file: number of the file that was read last.
        lines_before: line ends of that file before the next block; None if unknown, as in a shard that begins in the
            middle of the file. They are counted only when a bad line needs its number.
    """

    count: int = 0
    num_lines: int = 0
    bad_bytes: int = 0
    num_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    file: int = -1
    lines_before: int | None = None

    def add(self, result: EncodedBlock, folder: WorkFolder, options: BlockOptions) -> None:
        """Number the bad lines of the next block and append them to the folder's list."""
        block = result.block
        if block.file != self.file:
            self.file, self.lines_before = block.file, 0 if block.position == 0 else None
        if result.bad_lines and self.lines_before is None:
            self.lines_before = lines_before(block, options)
        for bad in result.bad_lines:
            assert self.lines_before is not None
            line = {"file": block.path, "line": self.lines_before + bad.line, "reason": bad.reason}
            folder.append(FILE, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            if len(self.first) < _SHOWN:
                self.first.append(f"{line['file']}:{line['line']}: {line['reason']}")
            kind = bad.kind if bad.kind in self.reasons or len(self.reasons) < _MOST_KINDS else "other reasons"
            self.reasons[kind] = self.reasons.get(kind, 0) + 1
            self.bad_bytes += bad.num_bytes
        self.count += len(result.bad_lines)
        self.num_bytes += result.num_bytes
        self.num_lines += result.num_lines
        if self.lines_before is not None:
            self.lines_before += result.num_ends

    def add_damage(self, block: Block, bytes_read: int) -> str:
        """Record that a file cannot be read beyond a block that was added; return a sentence about it.

        Args:
            bytes_read: bytes on disk that were read.
        """
        if find_format(block.path) in (FileFormat("parquet"), FileFormat("arrow")):
            place = f"{block.position:,} rows"  # where the damage is in bytes is unknown
        else:
            place = f"{bytes_read:,} bytes" + ("" if self.lines_before is None else f" and {self.lines_before:,} lines")
        problem = f"{block.path}: truncated or corrupt after {place}: {str(block.damage).rstrip('.')}"
        self.damaged.append(problem)
        return problem

    def summary(self) -> str:
        """Return the number of bad lines and the first few of them."""
        return f"{self.count} bad{': ' if self.first else ''}{'; '.join(self.first)}"


def join_logs(logs: Sequence[BadLineLog]) -> BadLineLog:
    """Return the totals over several shards."""
    first = [line for log in logs for line in log.first][:_SHOWN]
    reasons = Counter[str]()
    for log in logs:
        reasons.update(log.reasons)
    return BadLineLog(
        count=sum(log.count for log in logs),
        num_lines=sum(log.num_lines for log in logs),
        bad_bytes=sum(log.bad_bytes for log in logs),
        num_bytes=sum(log.num_bytes for log in logs),
        reasons=dict(reasons),
        damaged=[problem for log in logs for problem in log.damaged],
        first=first,
    )
