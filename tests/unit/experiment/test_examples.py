"""Every file of examples/experiments is planned without any data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_cpt.experiment.arms import load_experiment

FOLDER = Path(__file__).parents[3] / "examples" / "experiments"
FILES = sorted(path for path in FOLDER.glob("*/*.yaml") if path.name not in ("run.yaml", "trunk.yaml", "grow_to.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_example_is_planned(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_experiment(file, need_files=False)
    assert len(found.config.arms) >= 2
    for name, run in found.prepared.items():
        for phase in run.config.phases:
            assert sum(phase.blend.values()) == pytest.approx(1.0, abs=1e-6), (name, phase.name)
    if file.parent.name == "proxy":
        assert found.config.seeds == ([11] if file.stem == "law" else [1, 2, 3])
        held_out = found.units[0].config.validation
        assert held_out is not None
        assert {path.split("/")[2] for path in held_out.sources.values() if isinstance(path, str)} == {"heldout"}
    assert os.listdir() == []


def test_the_papers_switch_points() -> None:
    found = load_experiment(FOLDER / "nemotron4_15b" / "switch.yaml", need_files=False)
    assert found.prepared["fifth"].plan.phases[0].last_step == 45_225
    assert [len(found.prepared[arm].plan.phases) for arm in ("start", "half")] == [1, 2]
