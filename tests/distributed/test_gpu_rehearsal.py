"""The cheapest items of the GPU measurement at toy width, each in its own process as on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_the_rehearsal_runs_the_items_and_writes_only_to_its_folders(tmp_path: Path) -> None:
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, check=False).stdout
    command = [sys.executable, str(ROOT / "tools" / "dev" / "gpu_measure.py"), "--rehearse", "--items=0,3b"]
    command += [f"--out={tmp_path / 'out'}", f"--work={tmp_path / 'work'}", "--budget=3000", "--limit-factor=50"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert done.returncode == 0, (done.stdout, results)
    assert {key: entry["status"] for key, entry in results["items"].items()} == {"0": "done", "3b": "done"}
    assert results["items"]["0"]["figures"]["device"].startswith("CPU")
    assert results["items"]["3b"]["figures"]["step_seconds"]["repetitions"] == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "results.json", "summary.md"]
    assert "15B layers, bf16: MFU (3a.mfu) | >= 0.5 |  | not measured |" in (tmp_path / "out/summary.md").read_text()
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, check=False).stdout
    assert after == before
