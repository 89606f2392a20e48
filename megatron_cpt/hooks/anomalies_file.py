"""anomalies.jsonl: one line per step with a spike, NaN or infinity, with the samples that the step read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cpt.errors import CptError
from megatron_cpt.files.jsonl_log import JsonlLog, drop_lines_after
from megatron_cpt.hooks.hook import Hook
from megatron_cpt.provenance.trace import trace_step

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

FILE_NAME = "anomalies.jsonl"


class AnomaliesFile(Hook):
    """Writer of anomalies.jsonl on the main rank; each line is on disk before the run continues or ends."""

    def on_start(self, session: Session) -> None:
        """Drop the lines of steps that a resumed run repeats."""
        if session.ranks.is_main:
            drop_lines_after(session.output / FILE_NAME, session.state.step if session.is_resumed else -1)

    def on_anomaly(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line with the samples and documents of the step."""
        if session.ranks.is_main:
            with contextlib.closing(JsonlLog(session.output / FILE_NAME)) as file:
                file.append({**line, **_samples_of_step(session.output, line["step"])})


def _samples_of_step(run_directory: Path, step: int) -> dict[str, Any]:
    """Return `samples` in the order of the global batch, or None and the reason under `samples_unknown`."""
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
