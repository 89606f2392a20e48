"""Weights & Biases."""

from __future__ import annotations

from typing import Any

from megatron_cpt.config.schema import WandbConfig
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.train.hook import Hook
from megatron_cpt.train.setup import Session


class WandbHook(Hook):
    """The lines of metrics.jsonl as a W&B run, which a resume goes on with.

    Raises:
        UserError: when the package is not installed; before anything else starts.
    """

    def __init__(self, config: WandbConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("log.wandb: the package is not installed; pip install 'megatron-cpt[wandb]'") from error
        self._wandb, self._config = wandb, config
        self._run: Any = None

    def on_start(self, session: Session) -> None:
        """Open the run; its id is its name, so that a resume finds it.

        Raises:
            CptError: the server cannot be reached, or does not know the user.
        """
        if not session.ranks.is_main:
            return
        try:
            self._run = self._wandb.init(
                project=self._config.project,
                entity=self._config.entity,
                mode=self._config.mode,
                name=session.config.name,
                id=session.config.name,
                resume="allow",
                dir=str(session.output),
                config=session.config.to_dict(),
            )
        except self._wandb.Error as error:
            raise CptError(f"log.wandb: {error}; run `wandb login`, or set log.wandb.mode: offline") from error

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Log a line of training."""
        if self._run is not None:
            self._run.log({"train": line}, step=line["step"])

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Log the held-out losses."""
        if self._run is not None:
            self._run.log({"validation": line["validation"]}, step=line["step"])

    def on_end(self, session: Session) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish()
