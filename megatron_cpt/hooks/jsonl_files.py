"""Files of a run that gain a line per event: metrics.jsonl and anomalies.jsonl."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cpt.errors import CptError
from megatron_cpt.files.jsonl_log import JsonlLog, drop_lines_after
from megatron_cpt.hooks.hook import Hook
from megatron_cpt.provenance.run_history import ANOMALIES_FILE, METRICS_FILE
from megatron_cpt.provenance.trace import DocumentPart, TracedSample, trace_step

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

logger = logging.getLogger(__name__)


class MetricsFile(Hook):
    """Writer of metrics.jsonl on the main rank, unbuffered: a killed run loses at most the last line."""

    def __init__(self) -> None:
        self._file: JsonlLog | None = None

    def on_start(self, session: Session) -> None:
        """Open the file and drop the lines of steps that a resumed run repeats."""
        if session.ranks.is_main:
            path = session.output / METRICS_FILE
            if not session.is_resumed and path.exists() and path.stat().st_size:
                logger.warning(
                    "%s: its run left no checkpoint, so training starts over and the lines of that run are dropped",
                    path,
                )
            drop_lines_after(path, session.state.step if session.is_resumed else -1)
            self._file = JsonlLog(path)

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line of training metrics, of validation losses or of an evaluation."""
        if self._file is not None:
            self._file.append(line)

    on_validation = on_evaluation = on_metrics

    def on_end(self, session: Session) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class AnomaliesFile(Hook):
    """Writer of a line per step with a spike, NaN or infinity, on disk before the run continues or ends."""

    def on_start(self, session: Session) -> None:
        """Drop the lines of steps that a resumed run repeats."""
        if session.ranks.is_main:
            drop_lines_after(session.output / ANOMALIES_FILE, session.state.step if session.is_resumed else -1)

    def on_anomaly(self, session: Session, line: dict[str, Any]) -> None:
        """Append a line with the samples and documents of the step."""
        if session.ranks.is_main:
            with contextlib.closing(JsonlLog(session.output / ANOMALIES_FILE)) as file:
                file.append({**line, **_samples_of_step(session.output, line["step"])})


def _samples_of_step(run_directory: Path, step: int) -> dict[str, Any]:
    """Return `samples` in the order of the global batch, or None and the reason under `samples_unknown`."""
    try:
        trace = trace_step(run_directory, step)
    except CptError as error:
        return {"samples": None, "samples_unknown": str(error)}
    samples = []
    for sample in trace.samples:
        place = {"source": sample.source, "k": sample.sample_index, "epoch": sample.epoch, "prefix": sample.prefix}
        documents = [_name_document(sample, part) for part in sample.documents]
        samples.append({**place, "documents": documents})
    return {"samples": samples}


def _name_document(sample: TracedSample, part: DocumentPart) -> int | str:
    """Return the document's number, behind its file if the sample is from a document list."""
    return part.document if part.prefix == sample.prefix else f"{part.prefix}:{part.document}"
