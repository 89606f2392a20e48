"""TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_cpt.train.hook import Hook
from megatron_cpt.train.setup import Session

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardHook(Hook):
    """Scalars under RUN/tensorboard, over steps."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_start(self, session: Session) -> None:
        """Open the writer; on a resume, points after the checkpoint are hidden."""
        if session.ranks.is_main:
            from torch.utils.tensorboard import SummaryWriter

            first = session.state.step + 1 if session.is_resumed else None
            self._writer = SummaryWriter(str(session.output / "tensorboard"), purge_step=first)

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Write rate, loss, gradient norm, speed and the losses and samples by source."""
        if self._writer is None:
            return
        for name in ("loss", "lr", "grad_norm", "tokens_per_second", "tokens"):
            self._writer.add_scalar(f"train/{name}", line[name], line["step"])
        for key in ("loss_by_source", "samples_by_source"):
            for source, value in line[key].items():
                self._writer.add_scalar(f"{key}/{source}", value, line["step"])

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Write the held-out losses."""
        if self._writer is not None:
            for name, loss in line["validation"].items():
                self._writer.add_scalar(f"validation/{name}", loss, line["step"])

    def on_end(self, session: Session) -> None:
        """Close the writer."""
        if self._writer is not None:
            self._writer.close()
