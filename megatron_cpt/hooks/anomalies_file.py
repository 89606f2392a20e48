"""anomalies.jsonl: one line for every step whose numbers were wrong, with what it read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from megatron_cpt.errors import CptError
from megatron_cpt.files.jsonl_log import JsonlLog, drop_lines_after
from megatron_cpt.provenance.trace import trace_step
from megatron_cpt.train.hook import Hook
from megatron_cpt.train.setup import Session

FILE_NAME = "anomalies.jsonl"


class AnomaliesFile(Hook):
    """Appends lines on the main rank, each durable before the run goes on: the next thing may be its end."""

    def on_start(self, session: Session) -> None:
        """Lines of steps that a resume will do again are dropped."""
        if session.ranks.is_main:
            drop_lines_after(session.output / FILE_NAME, session.state.step if session.is_resumed else -1)

    def on_anomaly(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line with the samples and documents of the step."""
        if not session.ranks.is_main:
            return
        with contextlib.closing(JsonlLog(session.output / FILE_NAME)) as file:
            file.append({**line, **samples_of(session.output, line["step"])})


def samples_of(run_directory: Path, step: int) -> dict[str, Any]:
    """What a step read: `samples`, in the order of the global batch; or `samples_unknown` and why."""
    try:
        trace = trace_step(run_directory, step)
    except CptError as error:
        return {"samples": None, "samples_unknown": str(error)}
    samples = [
        {
            "source": sample.source,
            "k": sample.sample_index,
            "epoch": sample.epoch,
            "prefix": sample.prefix,
            "documents": [part.document for part in sample.documents],
        }
        for sample in trace.samples
    ]
    return {"samples": samples}
