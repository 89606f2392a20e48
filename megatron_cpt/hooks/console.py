"""Progress of the run on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_cpt.checkpoint.layout import checkpoint_name
from megatron_cpt.config import format_count
from megatron_cpt.files.system_errors import close_stderr
from megatron_cpt.hooks.hook import Hook
from megatron_cpt.views.evaluation_table import rows_of_metrics
from megatron_cpt.views.terminal_console import TerminalConsole

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

_NOTABLE_WAIT = 0.05  # share of a step from which waiting for data is printed


class _LastingConsole(TerminalConsole):
    """Console that outlives the reader of its pipe; rich's own console ends the process."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True
        close_stderr()


class ConsoleHook(Hook):
    """One line per report and, on a terminal, a progress bar below; prints on the main rank only."""

    def __init__(self) -> None:
        self._console = _LastingConsole(stderr=True, soft_wrap=True)
        self._progress: Progress | None = None

    def on_start(self, session: Session) -> None:
        """Print the size of the run, its layout and the checkpoint it starts from."""
        self._is_main = session.ranks.is_main
        self._newest = session.origin if session.is_resumed else None
        self._print(_headline(session))
        if self._is_main and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task(
                session.config.name, total=session.last_step, completed=session.state.step
            )
            self._progress.start()

    def on_step(self, session: Session) -> None:
        """Advance the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=session.state.step)

    def on_metrics(self, session: Session, line: dict[str, Any]) -> None:
        """Print the line of metrics."""
        steps = session.plan.steps
        mfu = f"  MFU {line['mfu']:.1%}" if line["mfu"] is not None else ""
        waited = line["data_wait_seconds"] / line["step_seconds"] if line["step_seconds"] else 0.0
        # adding 0.0 turns -0.0 to 0.0: rounding errors may make the divergence of equal models negative
        divergence = f"  KL {round(line['kl'], 4) + 0.0:.4f}" if line.get("kl") is not None else ""
        data = f"  data wait {waited:.0%}" if waited >= _NOTABLE_WAIT else ""
        self._print(
            f"step {line['step']:>{len(str(steps))}}/{steps}  {line['phase']}"
            f"  loss {line['loss']:.4f}{divergence}  lr {line['lr']:.3e}  grad {line['grad_norm']:.3f}"
            f"  {format_count(line['tokens_per_second'])} tokens/s{mfu}{data}"
            f"  peak {line['peak_memory_gib']:.1f} GiB  {_clock_time(line['eta'])} left"
        )

    def on_validation(self, session: Session, line: dict[str, Any]) -> None:
        """Print the held-out losses."""
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in line["validation"].items())
        self._print(f"step {line['step']}  held-out loss  {losses}")

    def on_evaluation(self, session: Session, line: dict[str, Any]) -> None:
        """Print the metrics of each task, without their standard errors."""
        self._print(f"step {line['step']}  evaluation in {_clock_time(line['evaluation_seconds'])}")
        for task, metrics in line["evaluation"].items():
            values = (f"{name} {value:.4f}" for name, value, _ in rows_of_metrics(metrics) if value is not None)
            self._print(f"  {task}  {'  '.join(values)}")

    def on_checkpoint(self, session: Session, path: str) -> None:
        """Print the path of the checkpoint."""
        self._newest = Path(path)
        self._print(f"saved {path}")

    def on_anomaly(self, session: Session, line: dict[str, Any]) -> None:
        """Print a warning with the value, its limit and whether the update was applied."""
        limit = f", above {line['limit']:.4f}" if line["limit"] is not None else ""
        outcome = "the update was applied" if line["action"] == "warn" else "the update was skipped"
        self._print(f"WARNING: step {line['step']}: {line['kind']} {line['value']:.4f}{limit}: {outcome}")

    def on_stop(self, session: Session, reason: str) -> None:
        """Print why the process stops before the end of the run, or that the end was not saved."""
        if reason and session.state.step == 0:
            self._print(f"{reason} before the first step; run the same command again to start")
        elif reason:
            self._print(f"{reason}: step {session.state.step} is saved; run the same command again to resume")
        elif self._newest is None or self._newest.name != checkpoint_name(session.state.step):
            restart = f"resumes from {self._newest}" if self._newest is not None else "starts over"
            self._print(
                f"step {session.state.step} was not saved (checkpoint.at_end: false); the same command {restart}"
            )

    def on_end(self, session: Session) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, text: str) -> None:
        if self._is_main:
            self._console.print(text)


def _headline(session: Session) -> str:
    config, ranks, parallel = session.config, session.ranks, session.config.parallel
    if session.state.step >= session.last_step:
        return f"{config.name}: step {session.state.step} is already done, nothing is left to do ({session.origin})"
    verb = f"resuming after step {session.state.step}" if session.is_resumed else "starting"
    origin = session.origin or "random weights"
    return (
        f"{config.name}: {verb} from {origin}; {format_count(session.plan.parameters.total)} parameters, "
        f"{session.plan.steps} steps of {session.plan.step_sizes} tokens; "
        f"TP {parallel.tensor} x PP {parallel.pipeline} x DP {ranks.data_parallel_size} on {ranks.device.type}, "
        f"{config.precision.compute}, {session.model.spec} layers"
    )


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
