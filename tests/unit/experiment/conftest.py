"""An experiment of two arms that differ only by name and a third one, and a stand-in for training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.experiment import child_process
from megatron_cpt.experiment.arms import Experiment, load_experiment
from tests.helpers import stand_in_train

WriteExperiment = Callable[..., Path]


@pytest.fixture
def write_experiment(tmp_path: Path, run_data: dict[str, Any]) -> WriteExperiment:
    """Function that writes an experiment, with changes to its keys and to the base's, and returns its path."""

    def write(base: dict[str, Any] | None = None, **changes: Any) -> Path:
        held_out = {"batches": 1, "sources": {"web": "held/web", "code": "held/code", "qa": "held/qa"}}
        run = {**run_data, "tokens": 10 * 512, "validation": held_out, **(base or {})}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
        experiment = {
            "name": "grid",
            "output": str(tmp_path / "grid"),
            "base": "base.yaml",
            "seeds": [1, 2, 3],
            "arms": {"base": {}, "same": {}, "high": {"schedule.max_lr": 2.0e-3}},
            **changes,
        }
        path = tmp_path / "experiment.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in experiment.items() if value is not None}, sort_keys=False)
        )
        return path

    return write


@pytest.fixture
def load(write_experiment: WriteExperiment) -> Callable[..., Experiment]:
    """Function that writes and plans an experiment."""
    return lambda **changes: load_experiment(write_experiment(**changes), need_files=False)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are trained by `stand_in_train`."""
    script = str(Path(stand_in_train.__file__))
    monkeypatch.setattr(child_process, "command", lambda arguments: [sys.executable, script, *arguments])
