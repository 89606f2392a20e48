"""Record bad lines one by one, count them, and refuse too many."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from megatron_cpt.data.preprocess.inputs import BlockOptions, lines_before
from megatron_cpt.data.preprocess.work_folder import WorkFolder
from megatron_cpt.data.preprocess.workers import EncodedBlock
from megatron_cpt.errors import RefusedError, UserError

FILE = "bad.jsonl"
_SHOWN = 5  # bad lines in an error message


@dataclass(frozen=True)
class MaxBad:
    """Limit on bad lines; None: no limit.

    Attributes:
        count: most bad lines.
        fraction: largest share of all lines; it is checked once all lines are read.
    """

    count: int | None = None
    fraction: float | None = None

    def check(self, num_bad: int, num_lines: int | None, summary: str) -> None:
        """Raise a RefusedError if there are too many bad lines; `num_lines` is None until all lines are read."""
        if self.count is not None and num_bad > self.count:
            raise RefusedError(f"nothing is written: more than {self.count} bad lines ({summary})")
        if self.fraction is not None and num_lines is not None and num_bad > self.fraction * num_lines:
            raise RefusedError(
                f"nothing is written: {num_bad} of {num_lines} lines are bad, more than {self.fraction:.4%} ({summary})"
            )


def parse_max_bad(value: str | int | None) -> MaxBad:
    """Read a number of lines (100) or a share of all lines ("0.1%").

    Raises:
        UserError: the value is neither.
    """
    if value is None:
        return MaxBad()
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", str(value).strip())
    if match is None or (match[2] and float(match[2]) > 100):
        raise UserError(f"max-bad {value!r}: give a number of lines, such as 100, or a share of them, such as 0.1%")
    return MaxBad(int(match[1])) if match[1] else MaxBad(fraction=float(match[2]) / 100)


@dataclass
class BadLineLog:
    """Bad lines so far; saved with the state.

    Attributes:
        count: bad lines.
        num_lines: lines that are not blank, bad ones included.
        first: the first few bad lines, for messages.
        file: number of the file that was read last.
        lines_before: line ends of that file before the next block; None if unknown, as in a shard that begins in the
            middle of the file. They are counted only when a bad line needs its number.
    """

    count: int = 0
    num_lines: int = 0
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
        self.count += len(result.bad_lines)
        self.num_lines += result.num_lines
        if self.lines_before is not None:
            self.lines_before += result.num_ends

    def summary(self) -> str:
        """Return the number of bad lines and the first few of them."""
        return f"{self.count} bad{': ' if self.first else ''}{'; '.join(self.first)}"


def join_logs(logs: Sequence[BadLineLog]) -> BadLineLog:
    """Return the totals over several shards."""
    first = [line for log in logs for line in log.first][:_SHOWN]
    return BadLineLog(sum(log.count for log in logs), sum(log.num_lines for log in logs), first)
