"""Trace of a few steps by torch's profiler, and a table of their costs."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_cpt.config.schema import ProfileConfig
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.jsonl_log import write_errors_as_cpt_errors
from megatron_cpt.hooks.hook import Hook

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

logger = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
_TABLE_ROWS = 40
_NAME_WIDTH = 80


class ProfileHook(Hook):
    """Profiler of the steps of section `profile`; each rank writes files of its own when the last step is done.

    A process that ends or starts between the first and the last step records its part of them.
    """

    def __init__(self, config: ProfileConfig) -> None:
        self._config = config
        self._profiler: profile | None = None
        self._step_mark = contextlib.ExitStack()
        self._first_step = 0

    def on_step_start(self, session: Session) -> None:
        """Start the profiler before the first step to record, and mark every step in the trace."""
        step, ranks, (first, last) = session.state.step + 1, self._config.ranks, self._config.steps
        if not first <= step <= last or (ranks is not None and session.ranks.rank not in ranks):
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if session.ranks.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(
                activities=activities, record_shapes=self._config.record_shapes, with_stack=self._config.with_stack
            )
            self._first_step = step
            self._profiler.start()
        self._step_mark.enter_context(record_function(f"step {step}"))

    def on_step(self, session: Session) -> None:
        """Stop the profiler after the last step to record, and write its files."""
        self._step_mark.close()
        if session.state.step == self._config.steps[1]:
            self._write(session)

    def on_stop(self, session: Session, reason: str) -> None:
        """Write the steps recorded so far if the process stops before the last step to record."""
        self._write(session)

    def on_end(self, session: Session) -> None:
        """Stop the profiler after an error; nothing is written."""
        self._step_mark.close()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, session: Session) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        steps = f"{self._first_step}-{session.state.step}"
        folder = session.output / PROFILE_FOLDER
        name = f"steps-{steps}-rank-{session.ranks.rank}"
        trace, aside = folder / f"{name}.pt.trace.json.gz", folder / f".{name}.pt.trace.json.gz"
        with write_errors_as_cpt_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(aside))
            os.replace(aside, trace)
            heading = f"{session.config.name}: steps {steps}, rank {session.ranks.rank}, torch {torch.__version__}"
            write_atomically(folder / f"{name}.txt", f"{heading}\n\n{_tables(profiler)}")
        logger.info("profile of steps %s: table and timeline are in %s", steps, folder)


def _tables(profiler: profile) -> str:
    """Return the operators and kernels that cost most, by time on the device and by time on the CPU."""
    averages = profiler.key_averages()
    orders = {"self CPU time": "self_cpu_time_total"}
    if any(event.self_device_time_total for event in averages):
        orders = {"self time on the device": "self_device_time_total", **orders}
    tables = [
        f"Top {_TABLE_ROWS} by {title}\n"
        + averages.table(sort_by=key, row_limit=_TABLE_ROWS, max_name_column_width=_NAME_WIDTH)
        for title, key in orders.items()
    ]
    return "\n".join(tables)
