from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import small_run, train_here


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml of the small run."""
    return small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def base(run_file: Path) -> Path:
    """A run directory whose newest checkpoint other runs start from."""
    output = run_file.parent / "base"
    run_ranks(1, train_here, str(run_file), [f"output={output}", "stop_at_step=4"])
    return output
