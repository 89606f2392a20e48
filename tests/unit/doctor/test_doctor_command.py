"""`megatron-cpt doctor` on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_cpt.cli import main
from tests.helpers.runs import small_run


def _found(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    (findings,) = json.loads(capsys.readouterr().out)["nodes"].values()
    return {finding["check"]: finding for finding in findings}


def test_a_run_that_can_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", str(small_run(tmp_path)), "--json", "checkpoint.every=5", "checkpoint.keep=2"])
    found = _found(capsys)
    assert found["run"]["level"] == "ok"
    assert "3 sources" in found["run"]["found"]
    assert "2 are kept" in found["space"]["found"]
    assert status == int(any(finding["level"] == "blocks" for finding in found.values()))


def test_data_that_is_not_here_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path)
    config = yaml.safe_load(run.read_text())
    config["sources"]["web"]["path"] = str(tmp_path / "nowhere")
    run.write_text(yaml.safe_dump(config))
    assert main(["doctor", str(run), "--json"]) == 1
    finding = _found(capsys)["run"]
    assert finding["level"] == "blocks"
    assert "nowhere" in finding["found"]
