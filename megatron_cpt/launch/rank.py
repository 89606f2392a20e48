"""Run one rank: `python -m megatron_cpt.launch.rank MODULE ARGUMENTS ...`, started by torchrun.

Status 75, 2 or 3 is no failure: a restart would not help, and the other ranks must not be killed for it. The rank
writes such a status to its report, and torchrun sees 0. The same holds for `doctor`'s status 1, a finding. Any other
status goes to both.

This module imports nothing heavy: a rank must handle signals while torch is still being imported.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

from megatron_cpt.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_REFUSED, EXIT_STOPPED, EXIT_USER
from megatron_cpt.launch.rank_report import FOLDER_VARIABLE, STOP_FILE, STOP_SIGNALS, Report


def main(arguments: list[str]) -> int:
    """Run a module as `python -m` does.

    Args:
        arguments: name of the module, then its own arguments.

    Returns:
        The status for torchrun: 0 unless the rank failed.
    """
    folder = Path(os.environ[FOLDER_VARIABLE])
    path = Report.path(folder, os.environ["LOCAL_RANK"])
    is_early = False

    def stop_before_training(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_early
        is_early = True
        raise SystemExit(EXIT_STOPPED)

    Report(os.getpid()).write(path)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # SIGINT, if the launcher runs in the background
            signal.signal(number, stop_before_training)
    status = EXIT_FAILURE
    try:
        # torchrun has the signals blocked; a signal that arrived meanwhile is delivered by this call
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if (folder / STOP_FILE).exists():
            stop_before_training(signal.SIGTERM, None)
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        status = EXIT_OK
    except SystemExit as stop:
        status = _exit_status(stop.code)
        if status == EXIT_INTERRUPTED:  # of a command that stops at once, such as `evaluate`
            status = EXIT_STOPPED
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        Report(os.getpid(), status, is_early and status == EXIT_STOPPED).write(path)
    is_finding = status == EXIT_FAILURE and arguments[1:2] == ["doctor"]
    return EXIT_OK if is_finding or status in (EXIT_USER, EXIT_REFUSED, EXIT_STOPPED) else status


def _exit_status(code: str | int | None) -> int:
    """Return the status with which Python ends on `SystemExit(code)`."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return EXIT_FAILURE
    return code or EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
