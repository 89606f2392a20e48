"""metrics.jsonl: one line per report and per validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_cpt.files.jsonl_log import JsonlLog, drop_lines_after
from megatron_cpt.hooks.hook import Hook

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

FILE_NAME = "metrics.jsonl"


class MetricsFile(Hook):
    """Writer of metrics.jsonl on the main rank; lines are not buffered, so a killed run loses at most the last one."""

    def __init__(self) -> None:
        self._file: JsonlLog | None = None

    def on_start(self, session: Session) -> None:
        """Open the file and drop the lines of steps that a resumed run repeats."""
        if session.ranks.is_main:
            path = session.output / FILE_NAME
            drop_lines_after(path, session.state.step if session.is_resumed else -1)
            self._file = JsonlLog(path)

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line of training metrics."""
        if self._file is not None:
            self._file.append(line)

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line of validation losses."""
        if self._file is not None:
            self._file.append(line)

    def on_end(self, session: Session) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
