"""A job as torchrun and a scheduler run it: ranks with the launcher's variables, real exit statuses, and their output.

torchrun itself would import torch and megatron-core anew in every rank, which takes about ten seconds of two cores;
here the ranks are forked from a server that has imported both, and all else is the same: the agent's store, the
variables, the command line, signals, exit statuses.
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

Prepare = Callable[[int], None]  # called on every rank, with its number, before the command line


class Job:
    """`megatron-cpt train` on several ranks of one machine.

    Attributes:
        pids: of the ranks, in their order.
        logs: a file for each rank: what it wrote to stdout and stderr.
        seconds_to_end: from the first rank that ended badly to the last; None as long as that is not known.
        left_behind: ranks that were still there when the grace was over, and were killed.
    """

    def __init__(
        self, num_ranks: int, arguments: Sequence[str], folder: Path, *, prepare: Prepare | None = None
    ) -> None:
        """Start the ranks.

        Args:
            num_ranks: of them.
            arguments: of `megatron-cpt train`.
            folder: where the logs go.
            prepare: see `Prepare`; it must pickle.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.seconds_to_end: float | None = None
        self.left_behind: list[int] = []
        self._processes: list[Any] = [
            context.Process(
                target=_rank, args=(rank, num_ranks, self._store.port, [*arguments], str(self.logs[rank]), prepare)
            )
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
        """Whether no rank has ended yet."""
        return all(process.exitcode is None for process in self._processes)

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all that are still there."""
        for process in self._processes if rank is None else [self._processes[rank]]:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def wait(self, *, timeout: float = 120.0, grace: float = 30.0) -> int:
        """Wait for the end, as torchrun does: once a rank ends badly the others have `grace` seconds to follow.

        Returns:
            The job's status: 0, 75 if every rank ended with 0 or 75 and one with 75, else 1.

        Raises:
            TimeoutError: every rank was still at work at the timeout; the job is killed.
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
        """Exit status of every rank; minus the signal's number where one killed it."""
        return [process.exitcode for process in self._processes]

    def kill(self) -> None:
        """Kill what is left."""
        self.send(signal.SIGKILL)
        for process in self._processes:
            process.join()

    def output(self) -> str:
        """All that the ranks wrote."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())


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
