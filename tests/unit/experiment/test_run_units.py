"""The local engine: runs, resumes, failures and signals, with a stand-in for `train`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from megatron_cpt.config import RunConfig
from megatron_cpt.errors import CptError, RefusedError, UserError
from megatron_cpt.experiment.arms import Experiment
from megatron_cpt.experiment.compare_arms import compare_arms
from megatron_cpt.experiment.input_fingerprints import InputFingerprints
from megatron_cpt.experiment.reuse_runs import find_equal_run
from megatron_cpt.experiment.run_units import (
    experiment_lock,
    gpu_slots,
    train_command,
    train_units,
    unfinished_units,
    visible_gpus,
)
from megatron_cpt.experiment.unit_result import read_result

Load = Callable[..., Experiment]
pytestmark = pytest.mark.usefixtures("stand_in")


def run(found: Experiment, *, jobs: int = 1, restart_changed: bool = False) -> tuple[int, list[str], int]:
    """Train what is left; return status, lines and finished steps."""
    lines: list[str] = []
    steps: list[int] = []
    left = unfinished_units(found, found.units, restart_changed=restart_changed, tell=lines.append)
    if not left:
        return 0, lines, 0
    found.output.mkdir(exist_ok=True)
    status = train_units(found, left, jobs=jobs, tell=lines.append, advance=steps.append)
    return status, lines, sum(steps)


def starts(found: Experiment) -> list[str]:
    return (found.output / "starts.txt").read_text().split()


def test_all_runs_are_trained_once(load: Load) -> None:
    found = load()
    status, lines, steps = run(found, jobs=3)
    assert status == 0
    assert sorted(starts(found)) == sorted(unit.name for unit in found.units)
    assert steps == 9 * 10
    assert sum("finished in" in line for line in lines) == 9
    assert run(found) == (0, [], 0)
    comparison = compare_arms(found)
    verdicts = {row.arm: row.verdict for row in comparison.rankings[0].rows}
    assert verdicts == {"high": "better", "base": "baseline", "same": "noise"}
    assert (found.output / "high" / "seed-1" / "checkpoints").is_dir()
    given = yaml.safe_load((found.output / "high" / "seed-1.yaml").read_text())
    assert (given["seed"], given["schedule"]["max_lr"]) == (1, 2.0e-3)


def test_a_stopped_experiment_resumes_to_the_same_table(load: Load) -> None:
    unbroken = load()
    run(unbroken, jobs=2)
    expected = compare_arms(unbroken).to_dict()
    found = load(output=str(unbroken.output.with_name("stopped")))
    found.output.mkdir()
    (found.output / "wait-after-4").touch()

    def stop_when_two_wait() -> None:
        while sum(path.read_bytes().count(b"\n") == 4 for path in found.output.glob("*/*/metrics.jsonl")) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_two_wait)
    thread.start()
    status, lines, _ = run(found, jobs=2)
    thread.join()
    assert status == 75
    assert len(starts(found)) == 2
    assert any("stopped after a save" in line for line in lines)
    assert all(read_result(unit) is None for unit in found.units)
    (found.output / "wait-after-4").unlink()
    assert run(found, jobs=2)[0] == 0
    assert compare_arms(found).to_dict() == expected


def test_a_failed_run_does_not_stop_the_others(load: Load) -> None:
    found = load(seeds=[1, 2])
    found.output.mkdir()
    (found.output / "fail-same").touch()
    with pytest.raises(RefusedError) as caught:
        run(found)
    text = str(caught.value)
    assert "2 of 6 runs failed:" in text
    assert "same/seed-1: status 3: the stand-in fails, as the file says" in text
    comparison = compare_arms(found)
    assert comparison.missing == ["same/seed-1", "same/seed-2"]
    assert {row.arm: row.verdict for row in comparison.rankings[0].rows}["same"] == "unknown"
    (found.output / "fail-same").unlink()
    assert run(found)[0] == 0
    assert len(starts(found)) == 8


def test_changed_settings_are_refused_and_named(load: Load) -> None:
    run(load(seeds=[1]))
    found = load(seeds=[1], arms={"base": {}, "same": {}, "high": {"schedule.max_lr": 3.0e-3}})
    with pytest.raises(RefusedError, match=r"high/seed-1: schedule.max_lr was 0.002, is 0.003"):
        run(found)
    status, lines, steps = run(found, restart_changed=True)
    assert (status, steps) == (0, 10)
    assert lines[0].endswith("high/seed-1.before-1")
    assert starts(found)[-1] == "high/seed-1"
    assert (found.output / "high" / "seed-1.before-1" / "result.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\0", "is damaged (not UTF-8 text"),
        (b"[1]", "is damaged ("),
        (b"a: [", "is damaged ("),
        (None, "is missing"),
    ],
)
def test_a_finished_run_without_its_run_file_is_refused(load: Load, content: bytes | None, message: str) -> None:
    found = load(seeds=[1], arms={"base": {}})
    run(found)
    path = found.units[0].folder / "run.yaml"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RefusedError, match=r"restore them, choose another output, or .* --restart-changed") as caught:
        run(found)
    assert f"base/seed-1: {path} {message}" in str(caught.value)
    assert "give the path" not in str(caught.value)
    assert run(found, restart_changed=True)[::2] == (0, 10)


def test_checkpoints_can_be_removed_once_the_result_is_safe(load: Load) -> None:
    found = load(seeds=[1], keep_checkpoints="none")
    run(found)
    assert not list(found.output.glob("*/*/checkpoints"))
    assert run(found) == (0, [], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": {"web": True, "qa": 5.0, "code": 5.0}}, "damaged (held_out.web"),
        ({"held_out": {"web": 5.0, "qa": -3, "code": 5.0}}, "damaged (held_out.qa"),
        ({"held_out": {"web": "5.0"}}, "damaged (held_out.web"),
        ({"held_out": None}, "damaged (held_out"),
        ({"steps": -7}, "damaged (steps"),
        ({"steps": 10.5}, "damaged (steps"),
        ({"format_version": 99}, "format version 99, this software reads 1; update it"),
        ({"format_version": "1"}, "damaged (format_version"),
        ({"format": "other"}, "damaged (format"),
        ({"tasks": 5}, "damaged (tasks"),
        ({"tasks": {"mmlu": {"acc": True}}}, "damaged (tasks.mmlu.acc"),
        ({"source_tokens": None}, "damaged (source_tokens"),
        ({"higher_is_better": {"mmlu": {"acc": 1}}}, "damaged (higher_is_better.mmlu.acc"),
        ({"inputs": {"init.from": 5}}, "damaged (inputs.init.from"),
    ],
)
def test_a_damaged_result_is_refused(load: Load, change: dict[str, Any], message: str) -> None:
    found = load(seeds=[1], arms={"base": {}})
    run(found)
    path = found.units[0].folder / "result.json"
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), **change}))
    for use in (compare_arms, run):
        with pytest.raises(RefusedError) as caught:
            use(found)
        assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b"null"])
def test_a_result_that_is_none_is_refused(load: Load, content: bytes) -> None:
    found = load(seeds=[1], arms={"base": {}})
    run(found)
    path = found.units[0].folder / "result.json"
    path.write_bytes(content)
    with pytest.raises(RefusedError, match=r"result.json: .*damaged"):
        compare_arms(found)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"init.from": 5}'])
def test_damaged_fingerprints_are_refused(load: Load, content: bytes) -> None:
    found = load(seeds=[1], arms={"base": {}})
    run(found)
    (found.units[0].folder / "result.json").unlink()
    found.units[0].inputs_file.write_bytes(content)
    with pytest.raises(RefusedError, match=r"seed-1.inputs.json: .*damaged"):
        run(found)


def test_a_run_without_held_out_losses_is_a_failure(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(seeds=[1], arms={"base": {}})
    monkeypatch.setattr("megatron_cpt.experiment.unit_result.RunReader", _NoMetrics)
    with pytest.raises(CptError, match="no held-out losses of the last step, 10"):
        run(found)


class _NoMetrics:
    def __init__(self, folder: Path) -> None:
        self.metrics = self
        self.validations: dict[int, dict[str, float]] = {}
        self.evaluations: dict[int, dict[str, dict[str, float]]] = {}

    def read(self) -> _NoMetrics:
        return self


def test_two_experiments_never_share_an_output(tmp_path: Path) -> None:
    with (
        experiment_lock(tmp_path),
        pytest.raises(UserError, match="another experiment runs in it"),
        experiment_lock(tmp_path),
    ):
        raise AssertionError("entered twice")


def test_gpus_are_shared_out_to_the_jobs() -> None:
    assert gpu_slots([], jobs=4, ranks=8) is None
    assert gpu_slots(["0", "1", "2"], jobs=3, ranks=1) == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"--jobs 2: 2 runs of 2 ranks need 4 GPUs, this machine has 3"):
        gpu_slots(["0", "1", "2"], jobs=2, ranks=2)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4,7"}) == ["4", "7"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_several_ranks_are_launched(load: Load) -> None:
    found = load(arms={"one": {}, "four": {"parallel": {"tensor": 2, "pipeline": 2}}}, seeds=[1])
    one, four = found.units
    assert train_command(found, one, {}) == ["train", str(one.run_file)]
    assert train_command(found, four, {}) == ["launch", "--nproc-per-node", "4", "--", "train", str(four.run_file)]
    nodes = {"CPT_HEAD": "a:1", "CPT_JOB": "9-0", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1"}
    words = " ".join(train_command(found, four, nodes))
    assert "--nproc-per-node 2 --nnodes 2 --node-rank 1" in words
    assert "is_host=0" in words


def test_an_equal_run_of_another_experiment_is_reused(load: Load, tmp_path: Path) -> None:
    first = load()
    run(first, jobs=3)
    arms = {"paper": {}, "low": {"schedule.max_lr": 5.0e-4}}
    second = load(name="second", output=str(tmp_path / "second"), arms=arms, reuse=[str(first.output)])
    taken = {unit.name: unit.folder for unit in second.units if unit.arm == "paper"}
    assert taken == {f"paper/seed-{seed}": first.output / "base" / f"seed-{seed}" for seed in (1, 2, 3)}
    before = starts(first)
    assert run(second)[0] == 0
    assert starts(first) == before
    assert sorted(starts(second)) == [f"low/seed-{seed}" for seed in (1, 2, 3)]
    rows = {row.arm: row for row in compare_arms(second).rankings[0].rows}
    base = {row.arm: row for row in compare_arms(first).rankings[0].rows}["base"]
    assert rows["paper"].mean == base.mean


def test_unfinished_runs_and_runs_of_other_files_are_not_reused(load: Load) -> None:
    first = load(arms={"base": {}})
    run(first, jobs=3)
    result = first.output / "base" / "seed-1" / "result.json"
    result.write_bytes(orjson.dumps({**orjson.loads(result.read_bytes()), "inputs": {"tokenizer": "xxh3:1"}}))
    (first.output / "base" / "seed-2" / "result.json").unlink()

    class Present(InputFingerprints):
        def of_run(self, config: RunConfig) -> dict[str, str]:
            return {"tokenizer": "xxh3:2"}

    configs = [unit.config.model_copy(update={"name": "other", "output": "elsewhere"}) for unit in first.units]
    found = [find_equal_run(config, [str(first.output)], Present()) for config in configs]
    assert found == [None, None, first.units[2].config]
