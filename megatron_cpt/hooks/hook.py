"""Extension points of the training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session


class Hook:
    """Base class for code that the training loop calls at fixed points; override the methods you need.

    Every method is called on every rank. A hook may read the session but must not change it. An exception raised by
    a hook ends the run.

    Example:
        class PrintLoss(Hook):
            def on_metrics(self, session, line):
                if session.ranks.is_main:
                    print(line["step"], line["loss"])
    """

    def on_start(self, session: Session) -> None:
        """Called before the first step of this process; `session.state.step` steps are already done."""

    def on_step_start(self, session: Session) -> None:
        """Called before every step; `session.state.step` steps are already done."""

    def on_step(self, session: Session) -> None:
        """Called after every step."""

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Called every `log.every` steps and at each save with the line for metrics.jsonl."""

    def on_anomaly(self, session: Session, line: dict[str, Any]) -> None:
        """Called after a step with a spike, NaN or infinity; `line` is complete on the main rank only."""

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Called after a validation with `{"step": ..., "validation": {NAME: loss}}`.

        With an `ema` section the line also has `validation_ema`, the losses of the moving average.
        """

    def on_evaluation(self, session: Session, line: dict[str, Any]) -> None:
        """Called after an evaluation with `{"step": ..., "evaluation": {TASK: {METRIC: float}}, ...}`.

        With an `ema` section the line also has `evaluation_ema`, the metrics of the moving average.
        """

    def on_checkpoint(self, session: Session, path: str) -> None:
        """Called after a checkpoint was published under `path`."""

    def on_stop(self, session: Session, reason: str) -> None:
        """Called after the last step, unless there was an error; `reason` says why the run is not at its end, if so."""

    def on_end(self, session: Session) -> None:
        """Called last, also after an error: close files and connections here."""


class HookList(Hook):
    """Hook that forwards every call of an `on_` method to its hooks, in their order."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = tuple(hooks)
        for name in vars(Hook):
            if name.startswith("on_") and name not in vars(HookList):
                setattr(self, name, partial(self._forward, name))

    def _forward(self, name: str, *arguments: Any) -> None:
        for hook in self._hooks:
            getattr(hook, name)(*arguments)

    def on_end(self, session: Session) -> None:
        """Forward the event to every hook, even if some of them fail."""
        with contextlib.ExitStack() as calls:
            for hook in reversed(self._hooks):  # an ExitStack calls the last one first
                calls.callback(hook.on_end, session)
