"""Heartbeats between the ranks of a job: if a rank dies, the other ranks end with its name instead of waiting forever.

A collective with a dead rank may raise at once (gloo), late, or never. So each rank has a thread that increments a
counter in the job's store once per second. The main rank reads all counters, the other ranks read the main rank's.

A rank raises the alarm if a counter stops, if a connection breaks, or if it ends with an error. The alarm is one key of
the store, which every rank reads once per second. Then each rank reads all counters again (the roll call) to find the
dead ranks, and ends with the same reason. For example, rank 2 of 4 is killed and rank 3 loses its connection:

    rank 0 in step 17: rank 2 gives no sign of life; rank 3 in step 17: Connection closed by peer

If the store's host freezes or is cut off, a call of the store never returns, and torch's own timeout of a call does not
end it. So a second thread watches the first one and ends this rank when a call waits for too long.

Timeouts count iterations of a thread, not seconds. If a scheduler suspends the whole job (SIGSTOP, a frozen cgroup),
no rank iterates, so no timeout expires. A single suspended rank is missed by the others.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch.distributed as dist

_BEAT_SECONDS = 1.0
_ROLL_CALL_SECONDS = 3.0  # a living rank beats in this time, unless a C call holds the GIL
_GRACE_SECONDS = 5.0  # for the main thread to raise the reason, before the thread ends the process
_DONE = "done"

_CONNECTION_ERRORS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "gloo/transport",
)
_jobs = itertools.count()  # every rank opens its jobs in the same order


def lost_connection(error: BaseException) -> str | None:
    """Return the message of a broken connection in an error or its causes; None for any other error."""
    current: BaseException | None = error
    while current is not None:
        text = str(current)
        is_lost = isinstance(current, dist.DistBackendError | dist.DistNetworkError)
        if is_lost or (isinstance(current, RuntimeError) and any(word in text for word in _CONNECTION_ERRORS)):
            found = [word for word in _CONNECTION_ERRORS if word in text and word != "gloo/transport"]
            return found[0] if found else _first_line(current)
        current = current.__cause__ or current.__context__
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def job_store() -> Any:
    """Open a private part of the job's store over a new connection; None if the store cannot read several keys at once.

    All ranks must call this equally often. The new connection is needed because torch has one per process, which a
    thread that waits for a key blocks for all others.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    if not store.has_extended_api():
        return None
    return dist.PrefixStore(f"peers/{next(_jobs)}", store.clone())  # type: ignore[attr-defined]


class _Store:
    """Store that knows whether a call waits for its answer.

    Attributes:
        is_waiting: True while a call has not returned.
        num_calls: number of calls so far.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self.is_waiting, self.num_calls = False, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)

        def call(*args: Any) -> Any:
            self.num_calls += 1
            self.is_waiting = True
            try:
                return method(*args)
            finally:
                self.is_waiting = False

        return call


class Peers:
    """Context manager that sends heartbeats and watches the other ranks.

    Args:
        store: result of `job_store`; None: no heartbeats.
        timeout: seconds without a heartbeat after which a rank counts as dead; None: no heartbeats.
        doing: returns the current activity for messages, such as `step 17`.
        end: ends this process with a message; called from the thread if the main thread is stuck.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        timeout: float | None,
        doing: Callable[[], str],
        end: Callable[[str], object],
    ) -> None:
        self._is_watching = store is not None and timeout is not None and world_size > 1
        self._store = _Store(store)
        self._rank, self._timeout, self._doing, self._end = rank, timeout or 0.0, doing, end
        self._others = [other for other in range(world_size) if other != rank]
        self._alarm = ""  # raised by this rank, not yet in the store
        self._verdict = ""
        self._wake, self._stop, self._is_known = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._second_thread = threading.Thread(target=self._watch_store, name="peers-store", daemon=True)
        self._beats = itertools.count(1)

    def __enter__(self) -> Peers:
        if self._is_watching:
            self._beat()
            self._thread.start()
            self._second_thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_watching:
            return
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=_GRACE_SECONDS)
        if kind is None:
            self._in_time(lambda: self._store.set(f"end/{self._rank}", _DONE))

    def announce(self, error: BaseException) -> None:
        """Report to the other ranks that this rank ends with an error."""
        text = f"{type(error).__name__}: {_first_line(error)}"
        self._raise_alarm(f"rank {self._rank} ended in {self._doing()}: {text}", is_ending=True)

    def explain(self, trouble: str) -> str:
        """Raise the alarm and wait for the roll call.

        Args:
            trouble: problem that this rank noticed, such as `Connection closed by peer`.

        Returns:
            One line with the dead ranks and the problem.
        """
        if self._is_watching:
            self._raise_alarm(f"rank {self._rank} in {self._doing()}: {trouble}")
            self._is_known.wait(_BEAT_SECONDS + _ROLL_CALL_SECONDS + 2.0)
        return self._verdict or f"rank {self._rank} in {self._doing()}: {trouble}"

    def _raise_alarm(self, text: str, *, is_ending: bool = False) -> None:
        if not self._is_watching:
            return
        if is_ending:  # this rank's thread ends too, so write to the store here
            self._in_time(lambda: (self._store.set(f"end/{self._rank}", text), self._store_alarm(text)))
            return
        self._alarm = self._alarm or text
        self._wake.set()

    def _in_time(self, call: Callable[[], object]) -> None:
        """Call the store from the main thread, which must end even if the store never answers or is gone."""

        def run() -> None:
            with contextlib.suppress(RuntimeError):  # rank 0 hosts the store and may have ended
                call()

        thread = threading.Thread(target=run, name="peers-end", daemon=True)
        thread.start()
        thread.join(timeout=_GRACE_SECONDS)

    def _watch(self) -> None:
        seen = dict.fromkeys(self._others if self._rank == 0 else [0], (b"", 0))
        num_failures = 0  # consecutive errors of the store
        while not self._stop.is_set():
            self._wake.wait(_BEAT_SECONDS)
            if self._stop.is_set():
                return
            try:
                self._beat()
                alarm = self._current_alarm() or self._find_silent_rank(seen)
                num_failures = 0
            except RuntimeError as error:
                num_failures += 1
                is_lost = self._is_too_long(num_failures)
                alarm = self._alarm or (f"the store of the job is gone ({_first_line(error)})" if is_lost else "")
            if alarm:
                return self._answer(alarm)

    def _watch_store(self) -> None:
        """End this rank if the other thread waits for one answer of the store for too long."""
        call, num_iterations = 0, 0
        while not self._stop.wait(_BEAT_SECONDS):
            is_same_call = self._store.is_waiting and self._store.num_calls == call
            call, num_iterations = self._store.num_calls, num_iterations + 1 if is_same_call else 0
            if self._is_too_long(num_iterations):
                trouble = (
                    f"the store of the job gave no answer for {self._timeout:.0f} s (resilience.peer_timeout); "
                    "its host, the node of rank 0, is frozen or cut off"
                )
                return self._conclude(trouble)

    def _conclude(self, reason: str) -> None:
        """Publish the verdict to the main thread, and end the process if that thread does not end by itself."""
        self._verdict = f"rank {self._rank} in {self._doing()}: {reason}"
        self._is_known.set()
        if not self._stop.wait(_GRACE_SECONDS):
            self._end(self._verdict)

    def _find_silent_rank(self, seen: dict[int, tuple[bytes, int]]) -> str:
        """Return an alarm if a watched rank has not beaten for too long, else an empty text.

        Args:
            seen: last counter of each watched rank, and the number of iterations since it changed; updated.
        """
        for other, beat in zip(seen, self._read(list(seen)), strict=True):
            num_iterations = seen[other][1] + 1 if beat == seen[other][0] else 0
            seen[other] = (beat, num_iterations)
            if self._is_too_long(num_iterations) and self._reported_end(other) != _DONE:
                return f"rank {other} gave no sign of life for {self._timeout:.0f} s (resilience.peer_timeout)"
        return ""

    def _is_too_long(self, num_iterations: int) -> bool:
        return num_iterations * _BEAT_SECONDS > self._timeout

    def _current_alarm(self) -> str:
        if self._alarm:
            return self._store_alarm(self._alarm)
        return self._get("alarm") if self._store.check(["alarm"]) else ""

    def _answer(self, alarm: str) -> None:
        """Take the roll call and publish the verdict; end the process if the main thread does not end by itself."""
        with contextlib.suppress(RuntimeError):
            alarm = self._store_alarm(alarm)
        dead = self._roll_call()
        if self._stop.is_set():
            return
        # the alarm already names a rank that timed out
        unnamed = [rank for rank in dead if not alarm.startswith(f"rank {rank} gave no sign of life ")]
        names = "".join(f"rank {rank} gives no sign of life; " for rank in unnamed)
        self._conclude(f"{names}{alarm.removeprefix(f'rank {self._rank} in ')}")

    def _roll_call(self) -> list[int]:
        """Return the ranks whose counter does not change, except those that reported their end."""
        try:
            before = self._read(self._others)
            deadline = time.monotonic() + _ROLL_CALL_SECONDS
            while time.monotonic() < deadline and not self._stop.wait(_BEAT_SECONDS / 2):
                self._beat()
            after = self._read(self._others)
            missing = [rank for rank, a, b in zip(self._others, before, after, strict=True) if a == b]
            return [rank for rank in missing if not self._reported_end(rank)]
        except RuntimeError:  # the store is gone, and the alarm is all there is
            return []

    def _beat(self) -> None:
        self._store.set(f"beat/{self._rank}", str(next(self._beats)))

    def _read(self, ranks: Sequence[int]) -> list[bytes]:
        """Return the counters of ranks; empty for a rank that has not started."""
        keys = [f"beat/{rank}" for rank in ranks]
        if not self._store.check(keys):
            return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]
        values: list[bytes] = self._store.multi_get(keys)
        return values

    def _reported_end(self, rank: int) -> str:
        key = f"end/{rank}"
        return self._get(key) if self._store.check([key]) else ""

    def _store_alarm(self, text: str) -> str:
        """Store an alarm unless there is one; return the alarm that is stored."""
        current: bytes = self._store.compare_set("alarm", "", text)
        return current.decode()

    def _get(self, key: str) -> str:
        value: bytes = self._store.get(key)
        return value.decode()
