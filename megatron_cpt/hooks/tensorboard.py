"""Scalars for TensorBoard, and the phases as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_cpt.files.jsonl_log import write_errors_as_cpt_errors
from megatron_cpt.hooks.hook import Hook

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from megatron_cpt.train.setup import Session

_TRAIN_SCALARS = (
    *("loss", "kl", "lr", "grad_norm", "tokens", "tokens_per_second"),
    *("step_seconds", "data_wait_seconds", "sync_wait_seconds"),
    *("tflops_per_gpu", "mfu", "peak_memory_gib", "reserved_memory_gib", "eta"),
)


class TensorBoardHook(Hook):
    """Writer of event files under `tensorboard/` of the run directory, on the main rank."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None
        self._phase = ""

    def on_start(self, session: Session) -> None:
        """Open the writer; on a resume, hide the points after the checkpoint."""
        if session.ranks.is_main:
            from torch.utils.tensorboard import SummaryWriter

            first = session.state.step + 1 if session.is_resumed else None
            self._folder = session.output / "tensorboard"
            with write_errors_as_cpt_errors(self._folder):
                self._writer = SummaryWriter(str(self._folder), purge_step=first)

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Write the training scalars, the number of the phase, and losses and samples by source."""
        known = {name: line[name] for name in _TRAIN_SCALARS if line.get(name) is not None}
        self._write({f"train/{name}": value for name, value in known.items()}, line["step"])
        for key in ("loss_by_source", "kl_by_source", "samples_by_source"):
            self._write({f"{key}/{source}": value for source, value in line.get(key, {}).items()}, line["step"])
        number = next(n for n, phase in enumerate(session.plan.phases, 1) if phase.name == line["phase"])
        self._write({"train/phase": number}, line["step"])
        if self._writer is not None and self._phase != line["phase"]:
            self._phase = line["phase"]
            with write_errors_as_cpt_errors(self._folder):
                self._writer.add_text("phase", self._phase, line["step"])

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Write the held-out losses."""
        self._write({f"validation/{name}": loss for name, loss in line["validation"].items()}, line["step"])

    def on_evaluation(self, session: Session, line: dict[str, Any]) -> None:
        """Write the metrics of each task."""
        scalars = {
            f"evaluation/{task}/{metric}": value
            for task, metrics in line["evaluation"].items()
            for metric, value in metrics.items()
        }
        self._write(scalars, line["step"])

    def on_end(self, session: Session) -> None:
        """Close the writer."""
        if self._writer is not None:
            with write_errors_as_cpt_errors(self._folder):
                self._writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        if self._writer is not None:
            with write_errors_as_cpt_errors(self._folder):  # an error of the writer's thread is raised by a later call
                for name, value in scalars.items():
                    self._writer.add_scalar(name, value, step)
