"""Stand-in for the functions of Ray that `data/ray_engine.py` calls; tasks run here when their result is asked for.

It pickles what Ray pickles, loses workers on demand and records what it was asked, in milliseconds. `test_ray.py` runs
the same code on Ray itself.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class RayError(Exception):
    """Counterpart of `ray.exceptions.RayError`."""


class RayTaskError(RayError):
    """Counterpart of `ray.exceptions.RayTaskError`: an error of the function, or one of Ray under it."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"task failed\n{cause}")
        self.cause = cause


class WorkerCrashedError(RayError):
    """Counterpart of `ray.exceptions.WorkerCrashedError`."""


@dataclass
class Reference:
    """Promise of a result."""

    call: Callable[[], Any]


@dataclass
class StandInRay:
    """State of the stand-in.

    Attributes:
        failing_starts: number of times that `init` fails first.
        lost: numbers of the tasks whose worker dies each time.
        starts: arguments of each `init`.
        most_waiting: most tasks that were handed out and not asked for.
    """

    failing_starts: int = 0
    lost: tuple[int, ...] = ()
    cpus: int = 2
    starts: list[dict[str, Any]] = field(default_factory=list)
    is_up: bool = False
    stops: int = 0
    waiting: int = 0
    most_waiting: int = 0
    tasks: int = 0

    def module(self) -> tuple[ModuleType, ModuleType]:
        """Return the modules `ray` and `ray.exceptions`."""
        ray, exceptions = ModuleType("ray"), ModuleType("ray.exceptions")
        for error in (RayError, RayTaskError, WorkerCrashedError):
            setattr(exceptions, error.__name__, error)
        for name in ("init", "shutdown", "is_initialized", "cluster_resources", "put", "get", "remote"):
            setattr(ray, name, getattr(self, name))
        return ray, exceptions

    def init(self, **arguments: Any) -> None:
        self.starts.append(arguments)
        if len(self.starts) <= self.failing_starts:
            raise (ConnectionError if arguments["address"] != "local" else Exception)("timed out\nlong trace")
        self.is_up = True

    def shutdown(self) -> None:
        self.stops += self.is_up
        self.is_up = False

    def is_initialized(self) -> bool:
        return self.is_up

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)}

    def put(self, value: Any) -> Reference:
        content = pickle.dumps(value)
        return Reference(lambda: pickle.loads(content))  # noqa: S301

    def remote(self, function: Callable[..., Any]) -> Any:
        def submit(*arguments: Any) -> Reference:
            number, self.tasks = self.tasks, self.tasks + 1
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
            sent = [one if isinstance(one, Reference) else self.put(one) for one in arguments]
            return Reference(lambda: self._run(number, function, sent))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=submit))

    def _run(self, number: int, function: Callable[..., Any], sent: list[Reference]) -> Any:
        self.waiting -= 1
        if number in self.lost:
            raise WorkerCrashedError("the worker died unexpectedly")
        try:
            return pickle.loads(pickle.dumps(function(*(one.call() for one in sent))))  # noqa: S301
        except Exception as error:
            raise RayTaskError(error) from error

    def get(self, reference: Reference) -> Any:
        return reference.call()


def install_ray(monkeypatch: pytest.MonkeyPatch) -> StandInRay:
    """Return a stand-in that `import ray` gives for the length of the test."""
    stand_in = StandInRay()
    for module in stand_in.module():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return stand_in
