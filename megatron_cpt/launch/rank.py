"""`python -m megatron_cpt.launch.rank MODULE ...`: one rank, between torchrun and the command.

A rank that ends with 75, 2 or 3 has not failed: starting it again would not help, and the others must not be stopped
for it. Such a status goes into this rank's report, and torchrun sees 0; so does the 1 of `doctor`, which has found
something. A fault keeps its status.

Nothing heavy is imported here: a rank must hear signals before torch is loaded.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

from megatron_cpt.errors import EXIT_FAILURE, EXIT_STOPPED
from megatron_cpt.launch.rank_report import FOLDER_VARIABLE, STOP_SIGNALS, STOPPING, TOLD, Report


def main(arguments: list[str]) -> int:
    """Run a module as `python -m` does; see above for what becomes of its status.

    Args:
        arguments: its name, and its own arguments.

    Returns:
        What torchrun shall see.
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
        signal.signal(number, stop_before_training)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # torchrun has them blocked; what came since comes now
        if (folder / STOPPING).exists():
            stop_before_training(signal.SIGTERM, None)
        status = _run(arguments)
    except SystemExit as stop:
        status = _number(stop.code)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    told = (*TOLD, EXIT_FAILURE) if arguments[1:2] == ["doctor"] else TOLD
    if status == 0 or status in told:
        Report(os.getpid(), status, is_early and status == EXIT_STOPPED).write(path)
        return 0
    return status


def _run(arguments: list[str]) -> int:
    sys.argv = list(arguments)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return _number(stop.code)
    return 0


def _number(code: str | int | None) -> int:
    """The status that Python would end with."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
