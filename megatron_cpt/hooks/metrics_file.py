"""metrics.jsonl: one line for every report and every validation."""

from __future__ import annotations

from typing import Any

from megatron_cpt.files.jsonl_log import JsonlLog, drop_lines_after
from megatron_cpt.train.hook import Hook
from megatron_cpt.train.setup import Session

FILE_NAME = "metrics.jsonl"


class MetricsFile(Hook):
    """Appends lines on the main rank; none waits in a buffer, so a killed run keeps all but the one being written."""

    def __init__(self) -> None:
        self._file: JsonlLog | None = None

    def on_start(self, session: Session) -> None:
        """Open the file; lines of steps that a resume will do again are dropped."""
        if not session.ranks.is_main:
            return
        path = session.output / FILE_NAME
        drop_lines_after(path, session.state.step if session.is_resumed else -1)
        self._file = JsonlLog(path)

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line of training."""
        if self._file is not None:
            self._file.append(line)

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line of validation."""
        if self._file is not None:
            self._file.append(line)

    def on_end(self, session: Session) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
