"""A rank for the tests of the launcher, which starts as fast as Python and does what its arguments say.

The first argument is a folder for traces of this rank. Each further one is `RANK:BEHAVIOR`; ranks without one `wait`.

| behavior | meaning |
| --- | --- |
| a number | end with this status |
| fault | in the first attempt, end with 9 once all ranks have started; in a later one, end with 0 |
| stop | on a stop signal save for a while, then end with 75 |
| linger | on a stop signal wait until rank 0 was stopped before training, and for some polls of the launcher more |
| deaf | on a stop signal run on |
| wait | run until something ends this rank |
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from megatron_cpt.launch.rank_report import FOLDER_VARIABLE, read_reports


def main() -> int:
    """Behave as the arguments say."""
    folder, *words = sys.argv[1:]
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    behavior = dict(word.split(":") for word in words).get(rank, "wait")
    on_signal = {"stop": _save, "linger": _linger, "deaf": _run_on}.get(behavior)
    if on_signal is not None:
        _listen(on_signal)
    Path(folder, f"started-{rank}-{attempt}").touch()
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} in attempt {attempt}: {behavior}", flush=True)
    if behavior == "fault":
        if attempt != "0":
            return 0
        while len(list(Path(folder).glob("started-*-0"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.05)
        return 9
    if behavior in ("wait", "stop", "linger", "deaf"):
        time.sleep(3600)
        return 1
    return int(behavior)


def _save() -> int:
    time.sleep(0.5 * (1 + int(os.environ["RANK"])))
    return 75


def _run_on() -> int:
    time.sleep(3600)
    return 1


def _linger() -> int:
    while not any(report.is_early for report in read_reports(Path(os.environ[FOLDER_VARIABLE]))):
        time.sleep(0.05)
    time.sleep(3)
    return 1


def _listen(on_signal: Callable[[], int]) -> None:
    def handle(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(on_signal())

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, handle)


if __name__ == "__main__":
    sys.exit(main())
