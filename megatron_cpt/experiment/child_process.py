"""Start `megatron-cpt` so that it saves and ends when the process that started it dies.

    python -m megatron_cpt.experiment.child_process PARENT_PID train RUN.yaml

The kernel sends SIGTERM when the parent ends, also by `kill -9` (prctl(2), PR_SET_PDEATHSIG); the setting outlives
execve(2). Without it a killed experiment would leave runs that hold their lock and their cores.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def command(arguments: list[str]) -> list[str]:
    """Return the words that start `megatron-cpt` with arguments as a child of this process."""
    return [sys.executable, "-m", "megatron_cpt.experiment.child_process", str(os.getpid()), *arguments]


def _main(parent: int, arguments: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended before the call
            sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "megatron_cpt", *arguments])


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
