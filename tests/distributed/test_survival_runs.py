"""Runs that crash, move to other ranks or fill their disk, compared with an undisturbed run."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
import pytest

from benchmarks.drill import Drill, Tally
from benchmarks.soak import RUN, STEPS, difference, train_quietly
from megatron_cpt.checkpoint.layout import checkpoints_folder, list_checkpoints
from megatron_cpt.checkpoint.manifest import find_faults
from tests.helpers.checkpoints import differing
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, read_metrics, read_reproducible_metrics, small_run, train_here

SMALL = {"preset": "tiny_llama", "layers": 2, "hidden": 64, "ffn_hidden": 96, "vocab": 257}
LAST_OF_GENERAL, LAST = 15, 20


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on two replicas; the phase changes after step 15."""
    return small_run(tmp_path_factory.mktemp("runs"), model=SMALL)


@pytest.fixture(scope="module")
def quiet(small_file: Path) -> Path:
    output = small_file.parent / "quiet"
    run_ranks(2, train_and_record, str(small_file), [f"output={output}"])
    return output


def train_and_record(path: str, overrides: Sequence[str], die_after: int | None = None) -> None:
    """Train and record the samples of every step; die after the step `die_after`, before it can be saved."""
    import torch.distributed as dist

    from megatron_cpt.train import trainer

    output = next(each for each in overrides if each.startswith("output=")).removeprefix("output=")
    real_step = trainer.train_step
    with open(f"{output}.samples-{dist.get_rank()}", "ab", buffering=0) as notes, pytest.MonkeyPatch.context() as patch:

        def step(*args, **kwargs):
            (data,) = (each for each in args if hasattr(each, "micro_batches"))
            result = real_step(*args, **kwargs)
            number = sum(data.counts.values()) // 8
            samples = [hashlib.sha256(row.tobytes()).hexdigest() for b in data.micro_batches for row in b.tokens]
            notes.write(orjson.dumps({"step": number, "samples": samples}) + b"\n")
            if number == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        patch.setattr(trainer, "train_step", step)
        assert train_here(path, overrides) == 0


def samples_of_steps(output: Path) -> list[set[str]]:
    """Return the samples of each step over all ranks; for a repeated step, the samples of the last time."""
    steps: dict[int, dict[int, list[str]]] = {}
    for rank, path in enumerate(sorted(output.parent.glob(f"{output.name}.samples-*"))):
        for line in path.read_bytes().splitlines():
            note = orjson.loads(line)
            steps.setdefault(note["step"], {})[rank] = note["samples"]
    assert sorted(steps) == list(range(1, LAST + 1))
    return [{sample for samples in steps[step].values() for sample in samples} for step in sorted(steps)]


@pytest.mark.long  # the tests below compare further runs with `quiet`
def test_two_equal_runs_have_equal_bits(small_file: Path, quiet: Path) -> None:
    again = small_file.parent / "again"
    run_ranks(2, train_here, str(small_file), [f"output={again}"])
    assert differing(newest(quiet), newest(again)) == []
    assert read_reproducible_metrics(quiet) == read_reproducible_metrics(again)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.long), 4])
def test_crashes_around_a_phase_switch_lose_no_sample_and_read_none_twice(
    small_file: Path, quiet: Path, every: int
) -> None:
    output = small_file.parent / f"switch-{every}"
    overrides = [f"output={output}", f"checkpoint.every={every}"]
    for die_after in (LAST_OF_GENERAL - 1, LAST_OF_GENERAL, LAST_OF_GENERAL + 1):
        with pytest.raises(RankError, match="died"):
            run_ranks(2, train_and_record, str(small_file), overrides, die_after)
        assert newest(output).name == f"step-{(die_after - 1) // every * every:08d}"
    run_ranks(2, train_and_record, str(small_file), overrides)

    samples = samples_of_steps(output)
    assert samples == samples_of_steps(quiet)
    assert [len(step) for step in samples] == [8] * LAST
    assert len(set().union(*samples)) == 8 * LAST, "no source is at its end: every sample comes once"
    assert read_reproducible_metrics(output) == read_reproducible_metrics(quiet)
    assert {line["phase"] for line in read_metrics(output)} == {"general", "qa"}
    assert differing(newest(quiet), newest(output)) == []


def test_another_number_of_ranks_goes_on_with_the_same_samples(small_file: Path, quiet: Path) -> None:
    """Train on 1 process, 2 replicas, with tensor parallelism, with a pipeline, and on 1 process again."""
    output = small_file.parent / "moved"
    segments = [(1, []), (2, []), (2, ["parallel.tensor=2"]), (2, ["parallel.pipeline=2"]), (1, [])]
    for number, (num_ranks, layout) in enumerate(segments, start=1):
        overrides = [f"output={output}", f"stop_at_step={4 * number}", *layout]
        run_ranks(num_ranks, train_and_record, str(small_file), overrides)
    assert samples_of_steps(output) == samples_of_steps(quiet)
    states = [orjson.loads((newest(each) / "state.json").read_bytes())["train"] for each in (quiet, output)]
    assert states[0]["data"] == states[1]["data"]
    assert states[0]["samples_by_source"] == states[1]["samples_by_source"]
    for a, b in zip(read_metrics(quiet), read_metrics(output), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that holds two checkpoints of the small run, but not three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("background", [pytest.param("false", marks=pytest.mark.long), "true"])
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(
    small_file: Path, small_disk: Path, background: str
) -> None:
    output = small_disk / "out"
    overrides = [f"output={output}", "checkpoint.every=2", f"checkpoint.async={background}"]
    with pytest.raises(RankError, match="No space left on device"):
        run_ranks(2, train_here, str(small_file), overrides)
    saved = list_checkpoints(checkpoints_folder(output))
    assert [path.name for path in saved] == ["step-00000002", "step-00000004"]
    assert [find_faults(path) for path in saved] == [[], []]
    assert newest(output) == saved[-1]

    shutil.rmtree(saved[0])  # free some space
    run_ranks(2, train_here, str(small_file), [*overrides, "stop_at_step=6"])
    assert [path.name for path in list_checkpoints(checkpoints_folder(output))] == ["step-00000004", "step-00000006"]


@pytest.mark.long
def test_fifty_kills_in_a_save_at_random_moments(tmp_path: Path) -> None:
    # enough steps for the many kills that miss the save on a loaded machine
    run_file = small_run(tmp_path, **{**RUN, "tokens": 100 * STEPS * 8 * 32, "checkpoint": {"every": 1, "keep": 2}})
    tally = Tally()
    drill = Drill(run_file, tmp_path / "killed", [], random.Random(50), tally)
    while tally.faults["kill in a save"] < 50:
        drill.live("kill in a save")
    end = f"stop_at_step={drill.newest_valid() + 5}"
    drill.arguments.append(end)
    assert drill.live(None) == 0
    quiet = train_quietly(run_file, tmp_path / "quiet", end)
    assert difference(quiet, tmp_path / "killed") is None
    assert tally.recoveries >= 50
