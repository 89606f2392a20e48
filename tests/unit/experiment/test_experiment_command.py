"""Command `experiment`: options, plans, the SLURM script and the result, with a stand-in for `train`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from megatron_cpt.cli import main
from megatron_cpt.experiment import run_units
from megatron_cpt.experiment.arms import Unit
from megatron_cpt.experiment.unit_result import UnitResult
from tests.helpers.runs import write_source

WriteExperiment = Callable[..., Path]


@pytest.fixture
def file(write_experiment: WriteExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Experiment of two arms with one seed, whose data exists."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/web", "data/code", "data/qa", "held/web", "held/code", "held/qa"):
        write_source(tmp_path / name, stride=1, documents=40)
    return write_experiment(seeds=[1, 2], arms={"base": {}, "high": {"schedule.max_lr": 2.0e-3}})


def test_plans_need_no_data(write_experiment: WriteExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", str(write_experiment()), "--plan", "--gpu", "h100", "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    high = next(line for line in lines if line.split()[:1] == ["high"])
    assert high.split()[1:4] == ["5.12K", "10", "8"]
    assert "0.002 to" in high
    assert any("3 arms x 3 seeds = 9 runs, 46.08K tokens" in line and "GPU hours" in line for line in lines)


def test_plans_as_json(write_experiment: WriteExperiment, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", str(write_experiment()), "--plan", "--json"]) == 0
    content = orjson.loads(capsys.readouterr().out)
    assert content["arms"]["high"]["schedule"]["max_lr"] == 2.0e-3


@pytest.mark.usefixtures("stand_in")
def test_train_compare_and_compare_again(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", str(file), "--json"]) == 0
    first = orjson.loads(capsys.readouterr().out)
    assert first["num_finished"] == 4
    assert main(["experiment", str(file), "--report-only", "--plot", "grid.png"]) == 0
    captured = capsys.readouterr()
    assert "Ranking by mean" in captured.out
    assert "grid/report.html" in captured.out
    assert Path("grid.png").stat().st_size > 1000
    assert main(["experiment", str(file)]) == 0
    assert "4 of 4 runs are finished and kept" in capsys.readouterr().err


@pytest.mark.usefixtures("stand_in")
def test_changes_are_seen_in_files_and_settings(
    file: Path, write_experiment: WriteExperiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(seeds=[1], arms={"base": {}, "high": {"schedule.max_lr": 2.0e-3}})
    assert main(["experiment", str(file)]) == 0
    write_experiment(seeds=[1], arms={"base": {}, "high": {"schedule.max_lr": 4.0e-3}})
    assert main(["experiment", str(file), "--report-only"]) == 0
    warnings = capsys.readouterr().err
    assert (
        "warning: high/seed-1 was trained with other settings or files: schedule.max_lr was 0.002, is 0.004" in warnings
    )
    assert "warning: base" not in warnings
    write_experiment(seeds=[1], arms={"base": {}})
    write_source(tmp_path / "data/qa", stride=1, documents=50)
    assert main(["experiment", str(file)]) == 3
    assert "base/seed-1: source qa had" in capsys.readouterr().err


def _write_trunk(content: str) -> None:
    folder = Path("trunk/checkpoints/step-00000004")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text('{"train": {"step": 4}}')
    (folder / "manifest.json").write_text(content)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("key", ["init.from", "sources.qa.path", "validation.sources.web"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_replaced_files_are_refused(
    file: Path, write_experiment: WriteExperiment, key: str, is_finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_trunk("one")
    write_experiment(seeds=[1], arms={"base": {}}, trunk="trunk")
    assert main(["experiment", str(file)]) == 0
    if not is_finished:
        Path("grid/base/seed-1/result.json").unlink()
    if key == "init.from":
        _write_trunk("other")
    else:  # of equal size
        path = Path("data/qa.bin" if key.startswith("sources") else "held/web.bin")
        path.write_bytes(path.read_bytes()[::-1])
    write_experiment(seeds=[1], arms={"base": {}, "twin": {}}, trunk="trunk")
    assert main(["experiment", str(file)]) == 3
    assert f"base/seed-1: {key}: its files were replaced by others" in capsys.readouterr().err
    assert not Path("grid/twin").exists()
    if is_finished:
        assert main(["experiment", str(file), "--report-only"]) == 0
        assert f"warning: base/seed-1 was trained with other settings or files: {key}" in capsys.readouterr().err
    assert main(["experiment", str(file), "--restart-changed"]) == 0
    assert "Runs: 2 of 2 finished." in capsys.readouterr().out


@pytest.mark.usefixtures("stand_in")
def test_files_replaced_during_a_run_are_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish = run_units.finish_unit

    def replace_and_finish(unit: Unit, *, keep_checkpoints: bool) -> UnitResult:
        path = Path("held/web.bin")
        path.write_bytes(path.read_bytes()[::-1])
        return finish(unit, keep_checkpoints=keep_checkpoints)

    monkeypatch.setattr(run_units, "finish_unit", replace_and_finish)
    assert main(["experiment", str(file), "--only", "base/seed-1"]) == 3
    assert "validation.sources.web: files were replaced by others while the run" in capsys.readouterr().err
    assert not Path("grid/base/seed-1/result.json").exists()


@pytest.mark.usefixtures("stand_in")
def test_one_run_only(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", str(file), "--only", "high/seed-2"]) == 0
    assert [path.parent.name for path in Path("grid/high").glob("*/result.json")] == ["seed-2"]
    assert not Path("grid/report.html").exists()
    assert main(["experiment", str(file), "--only", "high/seed-9"]) == 2
    assert "choose one of base/seed-1, base/seed-2, high/seed-1, high/seed-2" in capsys.readouterr().err


def test_nothing_is_compared_before_a_run_is_finished(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", str(file), "--report-only"]) == 2
    assert "no run is finished" in capsys.readouterr().err
    assert not Path("grid").exists()


@pytest.mark.parametrize("options", [["--plan", "--report-only"], ["--gpu", "h100"]])
def test_options_that_exclude_each_other(file: Path, options: list[str]) -> None:
    assert main(["experiment", str(file), *options]) == 2


def test_a_bad_arm_leaves_no_trace(
    write_experiment: WriteExperiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", str(write_experiment(arms={"a": {"tokens": "many"}}))]) == 2
    assert "arm a: tokens" in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_slurm_runs_one_task_per_run(
    file: Path, write_experiment: WriteExperiment, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = {"nodes": 2, "gpus_per_node": 8, "options": ["--partition=long"], "setup": ["module load cuda"]}
    write_experiment(seeds=[1, 2], slurm=slurm, ranks=4)
    assert main(["experiment", str(file), "--engine", "slurm", "--jobs", "3"]) == 0
    captured = capsys.readouterr().out
    assert "9 tasks" not in captured
    assert "6 tasks" in captured
    assert "--report-only" in captured
    script = Path("grid/experiment.sbatch").read_text()
    for line in ("#SBATCH --array=0-5%3", "#SBATCH --nodes=2", "#SBATCH --partition=long", "module load cuda"):
        assert line in script.splitlines()
    assert 'CPT_HEAD="${hosts[0]}' in script
    subprocess.run(["bash", "-n", "grid/experiment.sbatch"], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "grid/experiment.sbatch"], check=True)


def test_the_script_runs_its_task(file: Path, tmp_path: Path) -> None:
    assert main(["experiment", str(file), "--engine", "slurm"]) == 0
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {
        "srun": 'while [[ $1 == --* ]]; do shift; done; echo "${@: -1}" >> tasks.txt; exit 75',
        "squeue": "echo RUNNING",
        "scontrol": 'echo "$@" >> requeued.txt',
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "77"}
    environment |= {"SLURM_CPUS_ON_NODE": "4"}
    done = subprocess.run(["bash", "grid/experiment.sbatch"], env=environment, check=False)
    assert done.returncode == 75
    assert Path("tasks.txt").read_text() == "high/seed-1\n"
    assert Path("requeued.txt").read_text() == "requeue 77\n"
