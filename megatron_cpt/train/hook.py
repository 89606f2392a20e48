"""Where optional behavior joins the loop: fixed points, explicit arguments, nothing reached into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session


class Hook:
    """Override what you need. All methods are called on every rank, in the order of the list of hooks.

    A hook may read the session; it must not change training. What it raises ends the run.
    """

    def on_start(self, session: Session) -> None:
        """Before the first step of this process; `session.state.step` steps are done."""

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """After a step whose numbers are written down; `line` is the contract's line of metrics.jsonl."""

    def on_anomaly(self, session: Session, line: dict[str, Any]) -> None:
        """After a step whose numbers are wrong; `line` says what, and is complete on the main rank."""

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """After a validation: `{"step": ..., "validation": {NAME: loss}}`."""

    def on_step(self, session: Session) -> None:
        """After every step."""

    def on_checkpoint(self, session: Session, path: str) -> None:
        """After a checkpoint was published."""

    def on_stop(self, session: Session, reason: str) -> None:
        """After the last step of a process that ends as it should; `reason`: why before the end of the run, if so."""

    def on_end(self, session: Session) -> None:
        """After the last step of this process, also when it was stopped or failed."""
