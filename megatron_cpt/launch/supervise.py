"""torchrun with ranks that report to us: signals to the ranks, one status from theirs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from megatron_cpt.errors import EXIT_FAILURE, EXIT_OK, EXIT_REFUSED, EXIT_STOPPED, EXIT_USER
from megatron_cpt.launch.rank_report import FOLDER_VARIABLE, STOP_SIGNALS, STOPPING, Report, read_reports

GRACE_SECONDS = 60.0
"""How long the ranks of a node may stay behind one that cannot go on and has nothing to save."""

_POLL_SECONDS = 0.2
_DEATH_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # torchrun's own way of ending its ranks is right here


def supervise(
    options: Sequence[str], command: Sequence[str], *, module: str = "megatron_cpt", grace: float = GRACE_SECONDS
) -> int:
    """Run a command on all ranks of this node, to its end.

    A stop signal goes to the ranks, which save and end; no rank is started again after it, and no time limit of ours
    holds for a save. A rank that faults is started again by torchrun, with all others, as often as `--max-restarts`.

    Args:
        options: torchrun's.
        command: what the ranks run: arguments of `module`.
        module: run by `python -m`.
        grace: see `GRACE_SECONDS`.

    Returns:
        The status of the ranks of this node: 2 or 3 if one ended so; 75 if they were stopped; 0; else 1.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-cpt-launch-") as name:
        folder = Path(name)
        # torchrun inherits the blocked signals and never hears them: SLURM sends them to every process of a step.
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            agent = _start(folder, options, [module, *command])
            with _forward_signals(folder, agent):
                signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
                is_cut_off = _wait(folder, agent, grace)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
        reports = read_reports(folder)
        if agent.returncode == EXIT_USER and not reports:
            return EXIT_USER  # torchrun's own complaint about its options
        return combine([report.status for report in reports], is_valid=agent.returncode == 0 or is_cut_off)


def combine(statuses: Sequence[int | None], *, is_valid: bool) -> int:
    """One status for a node.

    Args:
        statuses: that its ranks reported.
        is_valid: whether torchrun saw no fault in the last attempt.
    """
    for told in (EXIT_USER, EXIT_REFUSED, EXIT_FAILURE):
        if told in statuses:
            return told
    if not is_valid:
        return EXIT_FAILURE
    return EXIT_STOPPED if EXIT_STOPPED in statuses else EXIT_OK


def _start(folder: Path, options: Sequence[str], command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start torchrun."""
    environment = {
        "OMP_NUM_THREADS": "1",  # torchrun's own choice, without its warning
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
        **os.environ,
        FOLDER_VARIABLE: str(folder),
    }
    run = [sys.executable, "-m", "torch.distributed.run", *options, "--module", "megatron_cpt.launch.rank", *command]
    return subprocess.Popen(run, env=environment, start_new_session=True)


@contextlib.contextmanager
def _forward_signals(folder: Path, agent: subprocess.Popen[bytes]) -> Iterator[None]:
    def stop(number: int, _frame: FrameType | None) -> None:
        (folder / STOPPING).touch()  # for ranks that have not begun to listen; the others get the signal
        print(f"launch: {signal.Signals(number).name}: the ranks save and end", file=sys.stderr, flush=True)
        for report in read_reports(folder):
            if report.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(report.pid, number)

    def end(number: int, _frame: FrameType | None) -> None:
        agent.send_signal(number)

    handlers = {**dict.fromkeys(STOP_SIGNALS, stop), **dict.fromkeys(_DEATH_SIGNALS, end)}
    earlier = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _wait(folder: Path, agent: subprocess.Popen[bytes], grace: float) -> bool:
    """Wait for torchrun's end; whether we had to end it, for a rank that others wait for in vain."""
    deadline: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(_POLL_SECONDS)
            return False
        reports = read_reports(folder)
        if not any(map(_is_final, reports)):
            deadline = None
        elif deadline is None:
            deadline = time.monotonic() + grace
        elif time.monotonic() > deadline:
            _kill(agent, reports)
            return True


def _is_final(report: Report) -> bool:
    return report.is_early or report.status in (EXIT_USER, EXIT_REFUSED)


def _kill(agent: subprocess.Popen[bytes], reports: Sequence[Report]) -> None:
    left = [report for report in reports if report.status is None]
    print(f"launch: {len(left)} ranks wait for one that has ended; ending them", file=sys.stderr, flush=True)
    agent.kill()  # first, or it would start them again
    agent.wait()
    for report in left:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(report.pid, signal.SIGKILL)  # torchrun gives each rank a session of its own
