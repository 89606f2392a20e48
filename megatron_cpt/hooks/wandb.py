"""Metrics for Weights & Biases (W&B)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_cpt.config.schema import WandbConfig
from megatron_cpt.errors import CptError, UserError, install_command
from megatron_cpt.hooks.hook import Hook

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session


class WandbHook(Hook):
    """Logger of the lines of metrics.jsonl to a W&B run; a resumed run continues the same W&B run.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, config: WandbConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"log.wandb: the package is not installed; {install_command('wandb')}") from error
        self._wandb, self._config = wandb, config
        self._run: Any = None

    def on_start(self, session: Session) -> None:
        """Open the W&B run; its id is the name of the run, so that a resume finds it.

        Raises:
            CptError: the server cannot be reached or rejects the login.
        """
        if not session.ranks.is_main:
            return
        try:
            self._run = self._wandb.init(
                **self._config.model_dump(),
                name=session.config.name,
                id=session.config.name,
                resume="allow",
                dir=str(session.output),
                config=session.config.to_dict(),
            )
        except self._wandb.Error as error:
            raise CptError(f"log.wandb: {error}; run `wandb login`, or set log.wandb.mode: offline") from error

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Log a line of training metrics."""
        if self._run is not None:
            self._run.log({"train": line}, step=line["step"])

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Log the held-out losses."""
        if self._run is not None:
            self._run.log(
                {key: line[key] for key in ("validation", "validation_ema") if key in line}, step=line["step"]
            )

    def on_evaluation(self, session: Session, line: dict[str, Any]) -> None:
        """Log the metrics of each task."""
        if self._run is not None:
            self._run.log(
                {key: line[key] for key in ("evaluation", "evaluation_ema") if key in line}, step=line["step"]
            )

    def on_end(self, session: Session) -> None:
        """Close the W&B run."""
        if self._run is not None:
            self._run.finish()
