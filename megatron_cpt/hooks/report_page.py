"""report.html of a run, kept up to date while it trains."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from megatron_cpt.hooks.hook import Hook
from megatron_cpt.report.run_record import RunReader
from megatron_cpt.report.write_report import REPORT_FILE, write_page

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

logger = logging.getLogger(__name__)

_MAX_SHARE = 0.01  # of a run's time that its reports may take


class ReportPage(Hook):
    """Writer of report.html on the main rank, after validations and when the process ends, also after an error.

    The first page that cannot be written is a warning; training continues, and later pages are tried. A page that took
    a second is not written again within 100 seconds, apart from the last one.
    """

    def __init__(self) -> None:
        self._reader: RunReader | None = None
        self._next_time = 0.0
        self._has_warned = False

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Write the page, unless pages would take more than 1 % of the time."""
        if time.monotonic() >= self._next_time:
            self._write(session)

    on_evaluation = on_validation

    def on_end(self, session: Session) -> None:
        """Write the final page."""
        self._write(session)

    def _write(self, session: Session) -> None:
        if not session.ranks.is_main:
            return
        started = time.monotonic()
        try:
            if self._reader is None:
                self._reader = RunReader(session.output)
            write_page([self._reader], session.output / REPORT_FILE)
        except Exception as error:  # noqa: BLE001 - a page about a run must not end the run
            self._reader = None  # it may have stopped in the middle of a file
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s cannot be written (%s: %s); training continues, `megatron-cpt report %s` shows the error",
                    session.output / REPORT_FILE,
                    type(error).__name__,
                    error,
                    session.output,
                )
        ended = time.monotonic()
        self._next_time = ended + (ended - started) / _MAX_SHARE
