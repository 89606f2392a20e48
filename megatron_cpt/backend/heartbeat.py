"""Signs of life between the ranks of a job, beside the collectives: no rank waits for ever for one that is gone.

A collective over a dead rank may raise at once (gloo), late, or never. So a thread of each rank counts up a number in
the job's store every second. The main rank looks at all numbers, the others at the main rank's. Whoever misses one, or
loses a connection, or ends with an error, raises the alarm: one key in the store, which every rank looks for once a
second. Then all take a roll call, and end with the same reason.

Time is counted in looks of that thread, not by the clock: ranks that a scheduler has suspended (SIGSTOP, a frozen
cgroup) have missed nothing when they wake up. A rank that alone is stopped is missed by those that go on looking.
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
_ROLL_CALL_SECONDS = 3.0  # a living rank shows itself in it, unless something holds its interpreter so long
_GRACE_SECONDS = 5.0  # for the main thread to end by itself, once the reason is known
_DONE = "done"

_LOST_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "gloo/transport",
)
_jobs = itertools.count()  # ranks open jobs one after the other in the same order


def lost_connection(error: BaseException) -> str | None:
    """The line of an error, or of one behind it, that says that a peer does not answer; None where none does."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        is_lost = isinstance(seen, dist.DistBackendError | dist.DistNetworkError)
        if is_lost or (isinstance(seen, RuntimeError) and any(word in text for word in _LOST_WORDS)):
            found = [word for word in _LOST_WORDS if word in text and word != "gloo/transport"]
            return found[0] if found else _first_line(seen)
        seen = seen.__cause__ or seen.__context__
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def job_store() -> Any:
    """A part of the job's store over a connection of its own; None where the store cannot read many keys at once.

    Every rank must call it as often as the others do. torch keeps one connection a process, and a thread that waits on
    it for a key keeps the others out.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    if not store.has_extended_api():
        return None
    return dist.PrefixStore(f"peers/{next(_jobs)}", store.clone())  # type: ignore[attr-defined]


class Peers:
    """Knows who is alive, inside a with block.

    Args:
        store: shared by all ranks and used for nothing else; None: no signs of life.
        rank: of this process.
        world_size: of the job.
        timeout: seconds without a sign of life after which a rank counts as gone; None: no signs of life.
        doing: what this rank is doing, for messages.
        end: ends this process with a message; called from the thread when the main thread cannot.
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
        self._store = store
        self._rank, self._timeout, self._doing, self._end = rank, timeout or 0.0, doing, end
        self._others = [other for other in range(world_size) if other != rank]
        self._alarm = ""  # raised here, and not in the store yet
        self._verdict = ""
        self._wake, self._stop, self._is_known = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._beats = itertools.count(1)

    def __enter__(self) -> Peers:
        if self._is_watching:
            self._beat()
            self._thread.start()
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
            with contextlib.suppress(RuntimeError):  # the store ends with its host, which may be done before
                self._set(f"end/{self._rank}", _DONE)

    def announce(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error of its own."""
        text = f"{type(error).__name__}: {_first_line(error)}"
        self._raise_alarm(f"rank {self._rank} ended in {self._doing()}: {text}", is_ending=True)

    def explain(self, trouble: str) -> str:
        """Raise the alarm and find out who is gone.

        Args:
            trouble: what this rank noticed.

        Returns:
            One line that says what happened to this rank and why.
        """
        if self._is_watching:
            self._raise_alarm(f"rank {self._rank} in {self._doing()}: {trouble}")
            self._is_known.wait(_BEAT_SECONDS + _ROLL_CALL_SECONDS + 2.0)
        return self._verdict or f"rank {self._rank} in {self._doing()}: {trouble}"

    def _raise_alarm(self, text: str, *, is_ending: bool = False) -> None:
        if not self._is_watching:
            return
        if is_ending:  # nobody asks this rank's thread any more: put it where the others look, at once
            with contextlib.suppress(RuntimeError):
                self._set(f"end/{self._rank}", text)
                self._store_alarm(text)
            return
        self._alarm = self._alarm or text
        self._wake.set()

    def _watch(self) -> None:
        seen = dict.fromkeys(self._watched(), (b"", 0))
        num_failures = 0  # of the store, in a row
        while not self._stop.is_set():
            self._wake.wait(_BEAT_SECONDS)
            if self._stop.is_set():
                return
            try:
                self._beat()
                alarm = self._current_alarm() or self._silence(seen)
                num_failures = 0
            except RuntimeError as error:
                num_failures += 1
                is_lost = self._is_too_long(num_failures)
                alarm = self._alarm or (f"the store of the job is gone ({_first_line(error)})" if is_lost else "")
            if alarm:
                return self._answer(alarm)

    def _watched(self) -> list[int]:
        """Whom this rank looks after in peace: the main rank all others, the others the main rank."""
        return self._others if self._rank == 0 else [0]

    def _silence(self, seen: dict[int, tuple[bytes, int]]) -> str:
        """The alarm over a rank that has not shown itself for too long; empty: all have.

        Args:
            seen: the number that each rank showed last, and how many looks ago; brought up to date.
        """
        for other, beat in zip(seen, self._read(list(seen)), strict=True):
            num_looks = seen[other][1] + 1 if beat == seen[other][0] else 0
            seen[other] = (beat, num_looks)
            if self._is_too_long(num_looks) and self._farewell(other) != _DONE:
                return f"rank {other} gave no sign of life for {self._timeout:.0f} s (resilience.peer_timeout)"
        return ""

    def _is_too_long(self, num_looks: int) -> bool:
        return num_looks * _BEAT_SECONDS > self._timeout

    def _current_alarm(self) -> str:
        if self._alarm:
            return self._store_alarm(self._alarm)
        return self._get("alarm") if self._store.check(["alarm"]) else ""

    def _answer(self, alarm: str) -> None:
        """Take the roll call, let the main thread end with the reason, or end it."""
        with contextlib.suppress(RuntimeError):
            alarm = self._store_alarm(alarm)
        gone = self._roll_call()
        if self._stop.is_set():
            return
        # one that was missed for too long is named in the alarm already
        new = [rank for rank in gone if not alarm.startswith(f"rank {rank} gave no sign of life ")]
        who = "".join(f"rank {rank} gives no sign of life; " for rank in new)
        alarm = alarm.removeprefix(f"rank {self._rank} in ")
        self._verdict = f"rank {self._rank} in {self._doing()}: {who}{alarm}"
        self._is_known.set()
        if not self._stop.wait(_GRACE_SECONDS):
            self._end(self._verdict)

    def _roll_call(self) -> list[int]:
        """The ranks that do not show themselves, and did not say goodbye."""
        try:
            before = self._read(self._others)
            deadline = time.monotonic() + _ROLL_CALL_SECONDS
            while time.monotonic() < deadline and not self._stop.wait(_BEAT_SECONDS / 2):
                self._beat()
            after = self._read(self._others)
            missing = [rank for rank, a, b in zip(self._others, before, after, strict=True) if a == b]
            return [rank for rank in missing if not self._farewell(rank)]
        except RuntimeError:  # the store is gone; the alarm is all that is known
            return []

    def _beat(self) -> None:
        self._set(f"beat/{self._rank}", str(next(self._beats)))

    def _read(self, ranks: Sequence[int]) -> list[bytes]:
        """The numbers of ranks; empty for those that have not begun."""
        keys = [f"beat/{rank}" for rank in ranks]
        if not self._store.check(keys):
            return [self._store.get(key) if self._store.check([key]) else b"" for key in keys]
        values: list[bytes] = self._store.multi_get(keys)
        return values

    def _farewell(self, rank: int) -> str:
        key = f"end/{rank}"
        return self._get(key) if self._store.check([key]) else ""

    def _store_alarm(self, text: str) -> str:
        """Raise it for all, unless another one is raised: then that one counts."""
        current: bytes = self._store.compare_set("alarm", "", text)
        return current.decode()

    def _set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def _get(self, key: str) -> str:
        value: bytes = self._store.get(key)
        return value.decode()
