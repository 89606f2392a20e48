"""events.jsonl: when the processes of a run started and stopped, and which checkpoints a start has skipped."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import time
from typing import TYPE_CHECKING, Any

from megatron_cpt import __version__
from megatron_cpt.backend.process_age import seconds_since_process_start
from megatron_cpt.checkpoint import layout
from megatron_cpt.errors import CptError
from megatron_cpt.files.jsonl_log import JsonlLog
from megatron_cpt.hooks.hook import Hook
from megatron_cpt.provenance.run_history import EVENTS_FILE

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

logger = logging.getLogger(__name__)


class EventsFile(Hook):
    """Writer of a line per start and per planned stop, on the main rank; a resumed run keeps all earlier lines.

    A killed or failed process leaves a start without a stop.
    """

    def on_start(self, session: Session) -> None:
        """Append the start: its checkpoint, its ranks, the age of the process and the versions of the code."""
        origin = str(session.origin) if session.origin is not None else None
        versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
        _append(
            session,
            event="start",
            step=session.state.step,
            **{"from": origin},
            resumed=session.is_resumed,
            ranks=session.ranks.world_size,
            device=session.ranks.device.type,
            startup_seconds=_startup_seconds(),
            skipped_checkpoints=_skipped_checkpoints(session),
            versions={"megatron_cpt": __version__, **versions},
        )

    def on_stop(self, session: Session, reason: str) -> None:
        """Append the stop with its reason (empty at the end of the run) and the seconds of its last save."""
        _append(session, event="stop", step=session.state.step, reason=reason, pause_seconds=session.meter.pause)


def _append(session: Session, *, event: str, **values: Any) -> None:
    if not session.ranks.is_main:
        return
    try:
        with contextlib.closing(JsonlLog(session.output / EVENTS_FILE)) as file:
            file.append({"event": event, "time": round(time.time(), 3), **values})
    except CptError as error:  # training does not depend on it, and a finished run is finished
        logger.warning("%s", error)


def _startup_seconds() -> float | None:
    """Return the seconds since this process started; None where the system does not tell."""
    try:
        return round(seconds_since_process_start(), 3)
    except (OSError, AttributeError, LookupError, ValueError):  # no /proc, or a clock that is not Linux's
        return None


def _skipped_checkpoints(session: Session) -> list[str]:
    """Return the run's checkpoints that are newer than the one it resumed from: they are corrupt."""
    published = layout.list_checkpoints(layout.checkpoints_folder(session.output)) if session.is_resumed else []
    return [path.name for path in published if layout.checkpoint_step(path) > session.state.step]
