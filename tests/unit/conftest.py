"""A small run that every unit test may bend to its needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run_data() -> dict[str, Any]:
    """A sound run of 100 steps of 8 x 64 tokens, in two phases over three sources of declared sizes."""
    return {
        "name": "small",
        "output": "runs/small",
        "model": {"preset": "tiny_nemotron"},
        "seq_length": 64,
        "batch": {"global": 8, "micro": 2},
        "tokens": 51_200,
        "schedule": {"shape": "cosine", "max_lr": 1.0e-3, "min_lr": 1.0e-5},
        "sources": {
            "web": {"path": "data/web", "tokens": "1M"},
            "code": {"path": "data/code", "tokens": "500K"},
            "qa": {"path": "data/qa", "tokens": 20_000, "max_epochs": 4},
        },
        "phases": [
            {"name": "general", "blend": {"web": 0.6, "code": 0.4}, "until": {"lr": 0.2}},
            {"name": "qa", "blend": {"web": 0.5, "code": 0.4, "qa": 0.1}},
        ],
    }


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes plain data as a run.yaml and returns its path."""

    def write(data: dict[str, Any]) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


@pytest.fixture
def repository() -> Path:
    return REPOSITORY
