"""`megatron-cpt experiment` with real training: a kill in the middle, and two arms that differ only by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
import yaml

from tests.helpers.runs import small_run, write_source

EXPERIMENT = [sys.executable, "-m", "megatron_cpt", "experiment"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = {"layers": 1, "hidden": 16, "ffn_hidden": 32, "heads": 2, "kv_groups": 1, "head_dim": 8, "vocab": 257}
pytestmark = pytest.mark.long


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Experiment of two equal arms with two seeds; 300 steps per run, a checkpoint every 20."""
    for name in ("web", "code"):
        write_source(tmp_path / "held" / name, stride=1, documents=20, seed=9)
    run = small_run(
        tmp_path,
        model={"preset": "tiny_nemotron", **TINY},
        tokens=300 * 8 * 32,
        validation={"batches": 1, "sources": {name: str(tmp_path / "held" / name) for name in ("web", "code")}},
        checkpoint={"every": 20},
    )
    experiment = {"name": "grid", "output": str(tmp_path / "grid"), "base": run.name, "seeds": [1, 2]}
    experiment |= {"arms": {"one": {}, "other": {}}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return path


def _experiment(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*EXPERIMENT, str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def test_killed_in_the_middle_and_resumed_gives_the_same_table(file: Path) -> None:
    process = subprocess.Popen([*EXPERIMENT, str(file)], stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    checkpoints = file.parent / "grid" / "one" / "seed-1" / "checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock = file.parent / "grid" / "one" / "seed-1" / "lock.json"
    while lock.exists():  # the run itself gets SIGTERM by the kernel, saves and ends
        time.sleep(0.1)
    assert not (file.parent / "grid" / "one" / "seed-1" / "result.json").exists()
    done = _experiment(file)
    assert done.returncode == 0, done.stderr
    summary = orjson.loads((file.parent / "grid" / "summary.json").read_bytes())
    for ranking in summary["rankings"]:
        # the killed run and its twin, which nothing interrupted, have ended at equal losses
        values = {row["arm"]: row["values"] for row in ranking["rows"]}
        assert values["one"] == values["other"]
        assert {row["verdict"] for row in ranking["rows"]} == {"baseline", "noise"}
    assert "not told apart from one (noise): other" in done.stdout
    assert "resum" in (file.parent / "grid" / "one" / "seed-1.log").read_text()


def test_ray_trains_the_same_runs(file: Path) -> None:
    pytest.importorskip("ray")
    done = _experiment(file, "--engine", "ray", "--jobs", "2")
    if "Ray did not start" in done.stderr:
        pytest.skip("this machine is too busy for Ray, which allows its processes 30 seconds to start")
    assert done.returncode == 0, done.stderr
    assert "4 of 4 finished" in done.stdout
    assert len(list((file.parent / "grid").glob("*/*/result.json"))) == 4
