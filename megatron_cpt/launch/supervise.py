"""Run torchrun, pass stop signals to its ranks, and combine their exit statuses into one."""

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

import psutil

from megatron_cpt.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_REFUSED, EXIT_STOPPED, EXIT_USER
from megatron_cpt.files.system_errors import print_now
from megatron_cpt.launch.environment import set_cuda_variables
from megatron_cpt.launch.rank_report import FOLDER_VARIABLE, STOP_FILE, STOP_SIGNALS, Report, read_reports

GRACE_SECONDS = 60.0
"""Seconds that the ranks of a node may wait for a rank that has ended with nothing to save."""

_POLL_SECONDS = 0.2
_END_FILE = "ending"  # created in the folder of the launch by the second SIGINT
_DEATH_SIGNALS = (signal.SIGHUP, signal.SIGQUIT)  # passed on: torchrun ends its ranks on these


def supervise(
    options: Sequence[str], command: Sequence[str], *, module: str = "megatron_cpt", grace: float = GRACE_SECONDS
) -> int:
    """Run a command on all ranks of this node until they end.

    A stop signal goes to the ranks, which save and end; saving has no time limit here, and no rank is restarted after
    it. A second SIGINT (Ctrl-C) kills the ranks. If a rank fails, torchrun restarts all ranks, up to `--max-restarts`
    times.

    Args:
        command: arguments of `module` on each rank.
        module: run with `python -m` on each rank.
        grace: see `GRACE_SECONDS`.

    Returns:
        The combined status of this node's ranks, see `combine`; 130 after a second SIGINT.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-cpt-launch-") as name:
        folder = Path(name)
        # torchrun inherits the blocked signals and ignores them: SLURM signals every process of a job step.
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            agent = _start(folder, options, [module, *command])
            with _forward_signals(folder, agent):
                signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
                is_failure = _wait(folder, agent, grace)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
        if (folder / _END_FILE).exists():
            return EXIT_INTERRUPTED
        reports = read_reports(folder)
        if agent.returncode == EXIT_USER and not reports:
            return EXIT_USER  # torchrun rejected its options
        status = combine(reports, is_failure=is_failure, is_stop_requested=(folder / STOP_FILE).exists())
        if status == EXIT_STOPPED and any(report.is_early for report in reports):
            print_now("launch: stopped before a checkpoint could be saved; run the same command again")
        return status


def combine(reports: Sequence[Report], *, is_failure: bool, is_stop_requested: bool) -> int:
    """Return one exit status for a node: 2 or 3 if a rank reported it, else 1 for a failure, else 75 or 0.

    Args:
        reports: last report of each rank.
        is_failure: torchrun saw a rank fail in its last attempt.
        is_stop_requested: the launcher received a stop signal. Without it, a rank that was stopped before training
            was ended because another rank failed.
    """
    statuses = {report.status for report in reports}
    for status in (EXIT_USER, EXIT_REFUSED):
        if status in statuses:
            return status
    if is_failure or statuses - {None, EXIT_OK, EXIT_STOPPED}:
        return EXIT_FAILURE
    if any(report.is_early for report in reports) and not is_stop_requested:
        return EXIT_FAILURE
    return EXIT_STOPPED if EXIT_STOPPED in statuses else EXIT_OK


def _start(folder: Path, options: Sequence[str], command: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {
        "OMP_NUM_THREADS": "1",  # torchrun's default, without its warning
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
        **os.environ,
        FOLDER_VARIABLE: str(folder),
    }
    set_cuda_variables(environment)
    # Otherwise the ranks of a restart share the store of those before, and connect to the addresses of killed ranks
    # (pytorch issues 135712 and 167288; torch 2.13 has no prefix per attempt any more).
    environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    run = [sys.executable, "-m", "torch.distributed.run", *options, "--module", "megatron_cpt.launch.rank", *command]
    return subprocess.Popen(run, env=environment, start_new_session=True)


@contextlib.contextmanager
def _forward_signals(folder: Path, agent: subprocess.Popen[bytes]) -> Iterator[None]:
    num_interrupts = 0

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal num_interrupts
        num_interrupts += number == signal.SIGINT
        if num_interrupts > 1:
            (folder / _END_FILE).touch()
            return
        (folder / STOP_FILE).touch()  # for ranks that do not handle signals yet
        message = f"launch: received {signal.Signals(number).name}; ranks that train save a checkpoint, and all end"
        hint = "; press Ctrl-C again to end without saving" if number == signal.SIGINT else ""
        print_now(message + hint)
        for report in read_reports(folder):
            if report.status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(report.pid, number)

    pass_on = dict.fromkeys(_DEATH_SIGNALS, lambda number, _frame: agent.send_signal(number))
    handlers = dict.fromkeys(STOP_SIGNALS, stop) | pass_on
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so
        del handlers[signal.SIGINT]
    earlier = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _wait(folder: Path, agent: subprocess.Popen[bytes], grace: float) -> bool:
    """Wait for torchrun; end it if its ranks wait in vain for a rank that has ended, or after a second SIGINT.

    Returns:
        True if a rank failed.
    """
    deadline: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return agent.wait(_POLL_SECONDS) != 0
        if (folder / _END_FILE).exists():
            return _kill(folder, agent, "Ctrl-C came twice")
        # An early end without a stop request is torchrun's reaction to a failure: it restarts the ranks, or ends soon.
        is_stop_requested = (folder / STOP_FILE).exists()
        is_final = any(
            report.status in (EXIT_USER, EXIT_REFUSED) or (report.is_early and is_stop_requested)
            for report in read_reports(folder)
        )
        if not is_final:
            deadline = None
        elif deadline is None:
            deadline = time.monotonic() + grace
        elif time.monotonic() > deadline:
            return _kill(folder, agent, "a rank has ended, and the others wait for it")


def _kill(folder: Path, agent: subprocess.Popen[bytes], reason: str) -> bool:
    """Kill torchrun and the ranks that still run, and say why.

    Returns:
        True if a rank had failed and torchrun had not noticed yet.
    """
    agent.send_signal(signal.SIGSTOP)  # from here on it neither starts ranks nor collects dead ones
    os.waitid(os.P_PID, agent.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if agent.poll() is not None:
        return agent.returncode != 0
    children = psutil.Process(agent.pid).children()
    running = [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]
    # a rank that was killed (out of memory, a crash in CUDA) had no time to report a status
    has_died = any(report.status is None and report.pid not in running for report in read_reports(folder))
    count = "1 rank" if len(running) == 1 else f"{len(running)} ranks"
    print_now(f"launch: {reason}: killing {count}")
    agent.kill()
    agent.wait()
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # torchrun starts each rank in a session of its own
    return has_died
