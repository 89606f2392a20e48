"""Protection against waiting forever: a watchdog in this process, and one clear error when another rank is gone.

The watchdog is a thread that writes the stacks of all threads and ends this process when it makes no progress.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from megatron_cpt.backend import Ranks
from megatron_cpt.backend.heartbeat import Peers, job_store, lost_connection
from megatron_cpt.config.resilience import ResilienceConfig
from megatron_cpt.errors import EXIT_FAILURE, CptError
from megatron_cpt.files.whole_io import DiskFile

_STDERR = 2  # file descriptor: usable without Python's own stream objects
_BACKSTOP_SECONDS = 60.0  # after the limit, for the case that C code holds the interpreter lock and no thread can run


class Progress:
    """Current phase of this rank.

    Attributes:
        phase: for example "step 17" or "saving step 17".
        count: number of phases so far.
    """

    def __init__(self) -> None:
        self.phase, self.count = "start", 0

    def note(self, phase: str) -> None:
        """Note the beginning of a phase."""
        self.phase, self.count = phase, self.count + 1


class Watchdog:
    """Watcher of a `Progress` inside a with block.

    It counts its own polls and not clock time. A process that a scheduler suspends (SIGSTOP, a frozen cgroup) polls
    nothing meanwhile, so the time in suspension does not count as time without progress.

    Args:
        progress: to watch.
        limit: seconds without progress after which the process ends; None: no limit.
        rank: for messages and the name of the file.
        folder: of the files with stacks, such as `rank-00002-step-17.txt`.
        end: ends the process with a message.

    Attributes:
        explain: turns a reason into the last line of this rank; must return within seconds.
    """

    def __init__(
        self,
        progress: Progress,
        limit: float | None,
        *,
        rank: int,
        folder: Path,
        end: Callable[[str], object] | None = None,
    ) -> None:
        self._progress, self._limit, self._rank, self._folder = progress, limit, rank, folder
        self._end = end or end_process
        self.explain: Callable[[str], str] = str
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._limit is not None:
            self._thread.join()

    def dump(self) -> Path:
        """Write the stacks of all threads of this process to the folder and to stderr."""
        phase = re.sub(r"[^A-Za-z0-9]+", "-", self._progress.phase)
        path = self._folder / f"rank-{self._rank:05d}-{phase}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with DiskFile(path, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # a full disk must not keep a hanging rank alive
            print(f"rank {self._rank}: {path}: {error}", file=sys.stderr)
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        return path

    def _watch(self) -> None:
        limit = self._limit
        assert limit is not None
        poll = min(5.0, limit / 4)
        seen, stalled = self._progress.count, 0.0
        try:
            while not self._stop.wait(poll):
                count = self._progress.count
                seen, stalled = count, stalled + poll if count == seen else 0.0
                if stalled > limit:
                    path = self.dump()  # first, because a person needs to see where this rank hangs
                    message = self.explain(f"no progress for over {limit:g} s (resilience.hang_timeout)")
                    self._end(f"{message}; stacks in {path}")
                    return
                # A C thread prints the stacks if this thread stops running for longer than the limit; each poll
                # restarts its timer. It cannot tell a hang from a suspended process, so it ends nothing.
                faulthandler.dump_traceback_later(limit - stalled + _BACKSTOP_SECONDS, file=_STDERR)
        finally:
            faulthandler.cancel_dump_traceback_later()


def end_process(message: str) -> NoReturn:
    """Print a message and end the process immediately, even if other threads hang."""
    print(f"megatron-cpt: error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_FAILURE)


class LostPeerError(CptError):
    """Another rank of the job is gone, so this one cannot continue (exit status 1)."""


@contextlib.contextmanager
def guard(config: ResilienceConfig, ranks: Ranks, watchdog: Watchdog, progress: Progress) -> Iterator[None]:
    """Limit the time that this rank waits for another one, and report which rank is gone, also from the watchdog.

    Raises:
        LostPeerError: in place of an error of torch.distributed about a lost connection.
    """
    peers = Peers(
        job_store(),
        ranks.rank,
        ranks.world_size,
        timeout=config.peer_timeout,
        doing=lambda: progress.phase,
        end=lambda message: end_process(f"{message}; stacks in {watchdog.dump()}"),
    )
    with peers:
        watchdog.explain = peers.explain
        try:
            yield
        except Exception as error:
            trouble = lost_connection(error)
            if trouble is None or isinstance(error, CptError):
                peers.announce(error)
                raise
            raise LostPeerError(peers.explain(trouble)) from error
