"""What a person watching the run sees."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_cpt.config import format_count
from megatron_cpt.train.hook import Hook
from megatron_cpt.train.setup import Session


class ConsoleHook(Hook):
    """A line for every report; below them, on a terminal, a bar with the time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def on_start(self, session: Session) -> None:
        """Say what runs, on what, from where."""
        self._is_main = session.ranks.is_main
        if not self._is_main:
            return
        self._print(_headline(session))
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task(
                session.config.name, total=session.last_step, completed=session.state.step
            )
            self._progress.start()

    def on_step(self, session: Session) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=session.state.step)

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Print one line of numbers."""
        if not self._is_main:
            return
        left = (session.plan.after(session.last_step).tokens - session.state.tokens) / line["tokens_per_second"]
        self._print(
            f"step {line['step']:>{len(str(session.plan.steps))}}/{session.plan.steps}  {line['phase']}"
            f"  loss {line['loss']:.4f}  lr {line['lr']:.3e}  grad {line['grad_norm']:.3f}"
            f"  {format_count(line['tokens_per_second'])} tokens/s  {_duration(left)} left"
        )

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Print the held-out losses."""
        if self._is_main:
            losses = "  ".join(f"{name} {loss:.4f}" for name, loss in line["validation"].items())
            self._print(f"step {line['step']}  held-out loss  {losses}")

    def on_checkpoint(self, session: Session, path: str) -> None:
        """Say where it is."""
        if self._is_main:
            self._print(f"saved {path}")

    def on_anomaly(self, session: Session, line: dict[str, Any]) -> None:
        """Say what was wrong with a step, and what was done about it."""
        if self._is_main:
            limit = f", above {line['limit']:.4f}" if line["limit"] is not None else ""
            done = "the update was applied all the same" if line["action"] == "warn" else "the update was left out"
            self._print(f"WARNING: step {line['step']}: {line['kind']} {line['value']:.4f}{limit}: {done}")

    def on_stop(self, session: Session, reason: str) -> None:
        """Say why the run ends before its end."""
        if self._is_main and reason:
            self._print(f"{reason}: step {session.state.step} is saved, the same command goes on from there")

    def on_end(self, session: Session) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)


def _headline(session: Session) -> str:
    config, ranks, parallel = session.config, session.ranks, session.config.parallel
    origin = f"from {session.origin}" if session.origin else "from random weights"
    if session.state.step >= session.last_step:
        return f"{config.name}: step {session.state.step} is done already: nothing is left to do ({session.origin})"
    verb = f"going on after step {session.state.step}" if session.is_resumed else "starting"
    return (
        f"{config.name}: {verb} {origin}; {format_count(session.plan.parameters.total)} parameters, "
        f"{session.plan.steps} steps of {session.plan.step_sizes} tokens; "
        f"TP {parallel.tensor} x PP {parallel.pipeline} x DP {ranks.data_parallel_size} on {ranks.device.type}, "
        f"{config.precision.compute}, {session.model.spec} layers"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
