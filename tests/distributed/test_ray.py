"""`preprocess` and `mine` on Ray itself: the same bytes, also after a worker process was killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.data.preprocess import workers
from megatron_cpt.data.ray_engine import connect_ray

pytestmark = [
    pytest.mark.long,  # a cluster takes 10 to 20 seconds of computing to start
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"),
]

MARKER = "CPT_TEST_MARKER"
ROOT = Path(__file__).parents[2]
LINES = [json.dumps({"text": f"document {number} " * (number % 1500)}) for number in range(4000)]


def die_once(number: int, marker: str) -> int:
    """Kill the worker process at the first call with 3."""
    if number == 3 and not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def encode_or_die(*arguments: object) -> workers.EncodedBlock:
    """Kill the worker process at the first block, then encode."""
    marker = Path(os.environ[MARKER])  # of the cluster's processes
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return workers.encode_on_ray(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # Ray's workers import this module
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("\n".join(LINES) + "\n")
    return tmp_path


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, "-m", "megatron_cpt", *arguments]
    return subprocess.run(called, capture_output=True, text=True, check=False)


def test_a_killed_worker_and_the_bytes_of_preprocess(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess

    options = PreprocessOptions(append_eod=True, workers=1)
    preprocess(["a.jsonl"], "here", tokenizer="byte", options=options)
    monkeypatch.setenv(MARKER, str(corpus / "died in a block"))
    with connect_ray(None, num_cpus=2) as cluster:
        results = cluster.map_in_order(die_once, range(8), [str(corpus / "died")], in_flight=4)
        assert list(results) == [number * number for number in range(8)]
        monkeypatch.setattr(workers, "encode_on_ray", encode_or_die)
        on_ray = PreprocessOptions(append_eod=True, workers=2, engine="ray", block_bytes=1 << 18)
        preprocess(["a.jsonl"], "ray", tokenizer="byte", options=on_ray)
    assert (corpus / "died").exists()
    assert (corpus / "died in a block").exists()
    for ending in ("bin", "idx"):
        assert (corpus / f"ray.{ending}").read_bytes() == (corpus / f"here.{ending}").read_bytes()


def test_the_commands(corpus: Path) -> None:
    common = ["preprocess", "--input", "a.jsonl", "--tokenizer", "byte", "--append-eod", "--workers", "2"]
    assert command(*common, "--output-prefix", "here").returncode == 0
    done = command(*common, "--output-prefix", "ray", "--engine", "ray")
    assert done.returncode == 0, done.stderr
    assert " documents, " in done.stdout
    assert done.stderr == ""
    assert (corpus / "ray.bin").read_bytes() == (corpus / "here.bin").read_bytes()
    lost = command(*common, "--output-prefix", "no", "--engine", "ray", "--ray-address", "127.0.0.1:1")
    assert lost.returncode == 2
    assert "no connection to a Ray cluster" in lost.stderr
