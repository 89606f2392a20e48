"""`python -m tests.helpers.stand_in_rank WHAT ...`: a rank without torch, for tests of what starts ranks.

The first argument is a folder to leave traces in; each other one is `RANK:WHAT`: a number to end with, `fault` (once,
then 0), `stop` (with 75 at a stop signal, after some time of saving), or `wait`, as the ranks do that are not named.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType


def main() -> int:
    """Do what this rank is told."""
    folder, *told = sys.argv[1:]
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    what = dict(word.split(":") for word in told).get(rank, "wait")
    if what == "stop":
        _listen()
    Path(folder, f"started-{rank}-{attempt}").touch()
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} in attempt {attempt}: {what}", flush=True)
    if what == "fault":
        return 0 if attempt != "0" else 9
    if what in ("wait", "stop"):
        time.sleep(60)
        return 1
    return int(what)


def _listen() -> None:
    def stop(_number: int, _frame: FrameType | None) -> None:
        time.sleep(0.5 * (1 + int(os.environ["RANK"])))
        raise SystemExit(75)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)


if __name__ == "__main__":
    sys.exit(main())
