"""metrics.jsonl: one line for every report and every validation."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.checkpoint.layout import write_atomically
from megatron_cpt.train.hook import Hook
from megatron_cpt.train.setup import Session

FILE_NAME = "metrics.jsonl"


class MetricsFile(Hook):
    """Appends lines on the main rank; each is flushed, so that a killed run keeps all but the line being written."""

    def __init__(self) -> None:
        self._file: io.FileIO | None = None

    def on_start(self, session: Session) -> None:
        """Open the file; lines of steps that a resume will do again are dropped."""
        if not session.ranks.is_main:
            return
        path = session.output / FILE_NAME
        drop_lines_after(path, session.state.step if session.is_resumed else -1)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in on_end

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line of training."""
        self._append(line)

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line of validation."""
        self._append(line)

    def on_end(self, session: Session) -> None:
        """Close the file."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(orjson.dumps(line) + b"\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to a step; a half-written line at the end goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if orjson.loads(line)["step"] <= step:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError):
            continue  # the line that a crash cut
    write_atomically(path, "".join(line + "\n" for line in kept))
