"""Bad lines: written down one by one, counted, and too many of them refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from megatron_cpt.data.preprocess.block import BlockOptions
from megatron_cpt.data.preprocess.read_blocks import lines_before
from megatron_cpt.data.preprocess.work_folder import WorkFolder
from megatron_cpt.data.preprocess.workers import EncodedBlock
from megatron_cpt.errors import RefusedError, UserError

FILE = "bad.jsonl"
_SHOWN = 5  # bad lines in an error message


@dataclass(frozen=True)
class MaxBad:
    """How many bad lines are too many: more than a number, or more than a part of all lines.

    Attributes:
        count: the number; None: no limit.
        fraction: the part; None: no limit. It is looked at when all lines were read.
    """

    count: int | None = None
    fraction: float | None = None

    def check(self, num_bad: int, num_lines: int | None, summary: str) -> None:
        """Refuses too many.

        Args:
            num_bad: bad lines so far.
            num_lines: lines in all, if all were read.
            summary: the first of them.

        Raises:
            RefusedError: there are too many.
        """
        if self.count is not None and num_bad > self.count:
            raise RefusedError(f"nothing is written: more than {self.count} bad lines ({summary})")
        if self.fraction is not None and num_lines is not None and num_bad > self.fraction * num_lines:
            raise RefusedError(
                f"nothing is written: {num_bad} of {num_lines} lines are bad, more than {self.fraction:.4%} ({summary})"
            )


def parse_max_bad(value: str | int | None) -> MaxBad:
    """Reads a number of lines, or a part of them with a percent sign.

    Raises:
        UserError: it is neither.
    """
    if value is None:
        return MaxBad()
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", str(value).strip())
    if match is None or (match[2] and float(match[2]) > 100):
        raise UserError(f"max-bad {value!r}: give a number of lines, such as 100, or a part of them, such as 0.1%")
    return MaxBad(int(match[1])) if match[1] else MaxBad(fraction=float(match[2]) / 100)


@dataclass
class BadLineLog:
    """What was counted so far; all of it can be saved and loaded.

    Attributes:
        count: bad lines.
        num_lines: lines that are not blank, bad ones included.
        first: the first few, as they are shown.
        file: number of the file that was read last.
        lines_before: line ends in that file so far; None while nobody has counted those before a shard's beginning.
    """

    count: int = 0
    num_lines: int = 0
    first: list[str] = field(default_factory=list)
    file: int = -1
    lines_before: int | None = None

    def add(self, result: EncodedBlock, folder: WorkFolder, options: BlockOptions) -> None:
        """Names and writes the bad lines of the next block."""
        block = result.block
        if block.file != self.file:
            self.file, self.lines_before = block.file, 0 if block.position == 0 else None
        if result.bad_lines and self.lines_before is None:
            self.lines_before = lines_before(block, options)
        for bad in result.bad_lines:
            assert self.lines_before is not None
            line = {"file": bad.file, "line": self.lines_before + bad.line, "reason": bad.reason}
            folder.append(FILE, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            if len(self.first) < _SHOWN:
                self.first.append(f"{line['file']}:{line['line']}: {line['reason']}")
        self.count += len(result.bad_lines)
        self.num_lines += result.num_lines
        if self.lines_before is not None:
            self.lines_before += result.num_ends

    def summary(self) -> str:
        """Their number so far, and the first few."""
        return f"{self.count} bad{': ' if self.first else ''}{'; '.join(self.first)}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def joined(logs: Sequence[BadLineLog]) -> BadLineLog:
    """Of several shards."""
    first = [line for log in logs for line in log.first][:_SHOWN]
    return BadLineLog(sum(log.count for log in logs), sum(log.num_lines for log in logs), first)
