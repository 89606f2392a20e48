"""Ray as an engine, on a stand-in for Ray: order, bounded work, starts, errors, and the bytes of `preprocess`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.preprocess import workers
from megatron_cpt.data.ray_engine import RayFailedError, _set_environment, connect_ray, enter_folder
from megatron_cpt.errors import UserError
from tests.helpers.stand_in_ray import StandInRay, install_ray


def add(number: int, other: int) -> int:
    if number == 13:
        raise UserError("13 cannot be added")
    return number + other


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandInRay:
    return install_ray(monkeypatch)


def test_results_come_in_order_with_bounded_work(ray: StandInRay) -> None:
    with connect_ray(None, num_cpus=3) as cluster:
        assert cluster.num_cpus == 3
        assert list(cluster.map_in_order(add, range(10), [100], in_flight=4)) == list(range(100, 110))
    assert ray.most_waiting == 4
    assert not ray.is_up


def test_a_cluster_of_this_machine_is_private_and_leaves_nothing(ray: StandInRay, monkeypatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    before = dict(os.environ)
    with connect_ray(None, num_cpus=2):
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        (start,) = ray.starts
        assert Path(start["_temp_dir"]).is_dir()
    assert (start["address"], start["num_cpus"], start["include_dashboard"]) == ("local", 2, False)
    assert start["_node_ip_address"] == "127.0.0.1"
    assert not Path(start["_temp_dir"]).exists()
    assert dict(os.environ) == before


def test_a_process_that_has_not_imported_ray_gets_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setitem(sys.modules, "ray", sys)
    with contextlib.ExitStack() as stack:
        _set_environment(stack)
        assert "RAY_AUTH_MODE" not in os.environ
        monkeypatch.delitem(sys.modules, "ray")
        _set_environment(stack)
        assert (os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"])) == ("token", 64)
    assert set(os.environ) == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_a_slow_start_is_tried_again(ray: StandInRay) -> None:
    ray.failing_starts = 2
    with connect_ray(None, num_cpus=2):
        assert len(ray.starts) == 3
    ray.failing_starts = 9
    with pytest.raises(RayFailedError, match=r"did not start in 3 attempts: timed out; .*--engine local"):
        connect_ray(None, num_cpus=2).__enter__()


def test_a_running_cluster(ray: StandInRay) -> None:
    ray.cpus, before = 64, dict(os.environ)
    with connect_ray("auto", num_cpus=None) as cluster:
        assert cluster.num_cpus == 64
        assert ray.starts[0]["address"] == "auto"
        assert dict(os.environ) == before
        with connect_ray(None, num_cpus=2):  # inside a connection, that one is used
            assert len(ray.starts) == 1
        assert ray.is_up
    assert not ray.is_up
    ray.failing_starts = 2
    with pytest.raises(UserError, match=r"--ray-address auto: no connection to a Ray cluster: timed out;"):
        connect_ray("auto", num_cpus=2).__enter__()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        address = f"ray://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--ray-address {address}: no connection to a Ray cluster: .*refused"):
            connect_ray(address, num_cpus=2).__enter__()
    assert len(ray.starts) == 2


def test_errors_of_tasks(ray: StandInRay) -> None:
    with connect_ray(None, num_cpus=2) as cluster:
        with pytest.raises(UserError, match=r"^13 cannot be added$"):
            list(cluster.map_in_order(add, range(20), [1], in_flight=2))
        ray.lost = (ray.tasks + 1,)
        results = cluster.map_in_order(add, range(5), [1], in_flight=2)
        assert next(results) == 1
        with pytest.raises(RayFailedError, match=r"died more than 3 times.*run the same command again to resume"):
            next(results)


def test_a_node_without_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    enter_folder(str(tmp_path / "other"))
    assert Path.cwd() == tmp_path / "other"
    with pytest.raises(UserError, match="every node of the Ray cluster needs it"):
        enter_folder(str(tmp_path / "none"))


def encode(prefix: str, *options: str) -> int:
    common = ["--input", "a.jsonl", "--tokenizer", "byte", "--append-eod", "--shuffle", "5"]
    return main(["preprocess", "--output-prefix", prefix, *common, *options])


def test_preprocess_writes_the_same_bytes(ray: StandInRay, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatron_cpt.cli.missing_package.require_module", lambda module: None)
    monkeypatch.setattr("megatron_cpt.data.preprocess.preprocess_run.SAVE_SECONDS", 0.0)
    lines = [json.dumps({"text": f"document {number} " * (number % 900)}) for number in range(2000)]
    Path("a.jsonl").write_text("\n".join(lines) + "\nno json\n")
    assert encode("here", "--workers", "1") == 0
    ray.lost = (3,)
    assert encode("ray", "--engine", "ray", "--workers", "2") == 1
    assert "run the same command again to resume" in capsys.readouterr().err
    ray.lost, done = (), ray.tasks
    assert encode("ray", "--engine", "ray", "--workers", "2") == 0
    assert ray.tasks > done > 3
    for ending in ("bin", "idx", "bad.jsonl"):
        assert Path(f"ray.{ending}").read_bytes() == Path(f"here.{ending}").read_bytes()
    assert encode("other", "--ray-address", "head:6379") == 2
    assert "add it, or remove the address" in capsys.readouterr().err


def test_a_node_with_other_versions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_ray_encoder", None)
    with pytest.raises(UserError, match=r"Ray node .* has .*ids may differ; install the same versions"):
        workers.encode_on_ray(None, "run", "/", None, None, {"megatron_cpt": "0.0"})
