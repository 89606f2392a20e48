"""The Ray engine with a stand-in for Ray, whose tasks run when their results are waited for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_cpt.errors import CptError, UserError
from megatron_cpt.experiment import ray_tasks
from megatron_cpt.experiment.arms import Experiment

Load = Callable[..., Experiment]


class _Ray(SimpleNamespace):
    """Cluster of one node with 2 CPUs; `statuses` by name of the run."""

    def __init__(self) -> None:
        super().__init__(exceptions=SimpleNamespace(RayError=RuntimeError), calls=[], starts_failed=0)

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if len(self.calls) <= self.starts_failed:
            raise ConnectionError("timed out\nlong trace")

    def is_initialized(self) -> bool:
        return False

    def shutdown(self) -> None:
        self.is_down = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Resources": {"CPU": 2.0}}]

    def remote(self, **_: Any) -> Callable[[Callable[..., Any]], Any]:
        return lambda function: SimpleNamespace(remote=lambda *words: lambda: function(*words))

    def wait(self, tasks: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task: Any) -> Any:
        return task()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> _Ray:
    """The stand-in, in the place of Ray."""
    found = _Ray()
    monkeypatch.setitem(sys.modules, "ray", found)  # type: ignore[arg-type]
    return found


def run(
    found: Experiment, statuses: dict[str, int], monkeypatch: pytest.MonkeyPatch, address: str | None = None
) -> int:
    def run_only(path: str, unit: str, folder: str, variables: dict[str, str]) -> tuple[int, str]:
        assert path == str(found.path)
        assert variables["OMP_NUM_THREADS"]
        return statuses.get(unit, 0), "the last line"

    monkeypatch.setattr(ray_tasks, "run_only", run_only)
    return ray_tasks.run_on_ray(found, found.units, address=address, jobs=2, tell=lambda _: None)


def test_statuses_of_the_tasks(load: Load, ray: _Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(seeds=[1])
    assert run(found, {}, monkeypatch) == 0
    assert run(found, {"high/seed-1": 75}, monkeypatch) == 75
    with pytest.raises(CptError, match=r"1 of 3 runs failed:\n  - same/seed-1: status 3: the last line"):
        run(found, {"same/seed-1": 3, "high/seed-1": 75}, monkeypatch)
    assert ray.is_down
    assert {(call["address"], call["_node_ip_address"]) for call in ray.calls} == {("local", "127.0.0.1")}


def test_a_slow_start_is_tried_again(load: Load, ray: _Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.starts_failed = 2
    assert run(load(seeds=[1]), {}, monkeypatch) == 0
    ray.calls.clear()
    ray.starts_failed = 3
    with pytest.raises(CptError, match="Ray did not start in 3 attempts: timed out;"):
        run(load(seeds=[1]), {}, monkeypatch)


def test_no_cluster_at_an_address(load: Load, ray: _Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.starts_failed = 1
    with pytest.raises(UserError, match="--ray-address auto: no connection to a Ray cluster: timed out"):
        run(load(seeds=[1]), {}, monkeypatch, "auto")


@pytest.mark.usefixtures("ray")
def test_a_run_without_room_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a run of 4 ranks needs a node with 4 CPUs; the largest has 2"):
        run(load(seeds=[1], ranks=4), {}, monkeypatch)
