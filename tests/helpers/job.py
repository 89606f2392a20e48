"""A job as torchrun and a scheduler run it: ranks with the launcher's variables, their exit statuses and output.

torchrun would import torch and megatron-core in every rank, which takes about ten seconds of two cores. Here the ranks
are forked from a server that has imported both. The agent's store, the variables, the command line, signals and exit
statuses are as under torchrun.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from megatron_cpt.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED
from tests.helpers.ranks import context

Prepare = Callable[[int], None]
"""Called with the rank on every rank, before the command runs."""


class Job:
    """`megatron-cpt train` on several ranks of one machine.

    Attributes:
        pids: process ids in the order of ranks.
        logs: one file per rank with its stdout and stderr.
        seconds_to_end: from the end of the first rank that failed to the end of the last rank; None before that.
        left_behind: ranks that were killed because they were still running after the grace period.
    """

    def __init__(
        self, num_ranks: int, arguments: Sequence[str], folder: Path, *, prepare: Prepare | None = None
    ) -> None:
        """Start the ranks.

        Args:
            num_ranks: number of processes.
            arguments: of `megatron-cpt train`.
            folder: for the logs.
            prepare: see `Prepare`; must be picklable.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
        here, there = context.Pipe()
        self._store: Any = context.Process(target=_host_store, args=(there,))
        self._store.start()
        port = here.recv()
        self.seconds_to_end: float | None = None
        self.left_behind: list[int] = []
        self._processes: list[Any] = [
            context.Process(target=_rank, args=(rank, num_ranks, port, [*arguments], str(self.logs[rank]), prepare))
            for rank in range(num_ranks)
        ]
        for process in self._processes:
            process.start()
        self.pids = [int(process.pid) for process in self._processes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def is_running(self) -> bool:
        """Return True while no rank has ended."""
        return all(process.exitcode is None for process in self._processes)

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all ranks that still run."""
        for process in self._processes if rank is None else [self._processes[rank]]:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def freeze_store(self) -> None:
        """Stop the process that hosts the job's store, as torchrun's agent on the first node does."""
        os.kill(self._store.pid, signal.SIGSTOP)

    def wait(self, *, timeout: float = 120.0, grace: float = 30.0) -> int:
        """Wait for the end as torchrun does: after the first rank fails, the others have `grace` seconds to end.

        Returns:
            The job's status: 0 if all ranks ended with 0, 75 if the others ended with 75, else 1.

        Raises:
            TimeoutError: no rank had failed by the timeout, but some still run; the job is killed.
        """
        deadline, first_bad = time.monotonic() + timeout, None
        while True:
            now, statuses = time.monotonic(), self.statuses()
            if first_bad is None and any(statuses):
                first_bad = now
            if None not in statuses:
                break
            if first_bad is None and now > deadline:
                self.kill()
                raise TimeoutError(f"the job was still running after {timeout} s\n{self.output()}")
            if first_bad is not None and now > first_bad + grace:
                self.left_behind = [rank for rank, status in enumerate(statuses) if status is None]
                self.kill()
            time.sleep(0.01)
        if first_bad is not None:
            self.seconds_to_end = time.monotonic() - first_bad
        if set(statuses) <= {EXIT_OK, EXIT_STOPPED}:
            return max(status for status in statuses if status is not None)
        return EXIT_FAILURE

    def statuses(self) -> list[int | None]:
        """Return the exit status of every rank: None while it runs, -9 if SIGKILL ended it."""
        return [process.exitcode for process in self._processes]

    def kill(self) -> None:
        """Kill the ranks that still run."""
        self.send(signal.SIGKILL)
        self._store.kill()
        for process in (*self._processes, self._store):
            process.join()

    def output(self) -> str:
        """Return the output of all ranks."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())


def _host_store(pipe: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    signal.pause()


def _rank(rank: int, num_ranks: int, port: int, arguments: list[str], log: str, prepare: Prepare | None) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    import torch

    from megatron_cpt.cli import main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    sys.exit(main(["train", *arguments]))
