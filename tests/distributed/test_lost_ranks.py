"""Ranks that die, stop, hang or fail, and signals: the other ranks end in time, with a clear message."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.checkpoints import differing
from tests.helpers.job import Job
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, train_here

ENDLESS = "tokens=1e8"
BOUND = 20.0  # seconds, for a busy machine; about 5 are needed


def _wait(condition: Callable[[], bool], job: Job, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.01)


def _start(run_file: Path, output: Path, num_ranks: int, *overrides: str, prepare: object = None) -> Job:
    """Start a job and wait until it has done some steps."""
    arguments = [str(run_file), f"output={output}", *overrides]
    job = Job(num_ranks, arguments, output.with_suffix(".logs"), prepare=prepare)  # type: ignore[arg-type]
    metrics = output / "metrics.jsonl"
    _wait(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, job)
    return job


def _seconds_until_others_end(job: Job, rank: int) -> float:
    started = time.monotonic()
    others = [r for r in range(len(job.pids)) if r != rank]
    _wait(lambda: all(job.statuses()[r] is not None for r in others), job, seconds=60.0)
    assert [job.statuses()[r] for r in others] == [1] * len(others)
    return time.monotonic() - started


def _last_lines(job: Job, rank: int) -> list[str]:
    return [log.read_text().splitlines()[-1] for r, log in enumerate(job.logs) if r != rank]


def test_kill_9_of_one_rank_ends_the_others_within_a_bound_and_they_say_why(run_file: Path) -> None:
    output = run_file.parent / "killed"
    with _start(run_file, output, 4, ENDLESS, "parallel.tensor=2") as job:
        job.send(signal.SIGKILL, 2)
        assert _seconds_until_others_end(job, 2) < BOUND
        for line in _last_lines(job, 2):
            assert line.startswith("megatron-cpt: error: rank ")
            assert "rank 2 gives no sign of life" in line
        assert "Traceback" not in job.output()


def test_a_stopped_rank_makes_the_others_leave_their_stacks_and_end(run_file: Path) -> None:
    output = run_file.parent / "stopped"
    with _start(run_file, output, 2, ENDLESS, "resilience.hang_timeout=4") as job:
        job.send(signal.SIGSTOP, 1)
        assert _seconds_until_others_end(job, 1) < BOUND + 4
        (line,) = _last_lines(job, 1)
        assert "rank 0 in step" in line
        assert "rank 1 gives no sign of life" in line
        assert "no progress for over 4 s (resilience.hang_timeout)" in line
        (stacks,) = (output / "stacks").iterdir()
        assert str(stacks) in line
        assert "trainer.py" in stacks.read_text()


def test_a_stopped_rank_is_missed_before_anything_hangs_too_long(run_file: Path) -> None:
    output = run_file.parent / "silent"
    with _start(run_file, output, 2, ENDLESS, "resilience.peer_timeout=3") as job:
        job.send(signal.SIGSTOP, 0)  # the rank that watches all others
        assert _seconds_until_others_end(job, 0) < BOUND + 3
        (line,) = _last_lines(job, 0)
        assert "rank 0 gave no sign of life for 3 s (resilience.peer_timeout)" in line
        assert [path.name[:10] for path in (output / "stacks").iterdir()] == ["rank-00001"]


def test_a_frozen_host_of_the_store_ends_all_ranks_in_time(run_file: Path) -> None:
    output = run_file.parent / "frozen-store"
    with _start(run_file, output, 2, ENDLESS, "resilience.peer_timeout=3") as job:
        job.freeze_store()
        assert job.wait(timeout=BOUND + 3) == 1
        assert job.left_behind == []
        for log in job.logs:
            assert "the store of the job gave no answer for 3 s (resilience.peer_timeout)" in log.read_text()


@pytest.mark.parametrize("seconds", [6, pytest.param(70, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "parallel", ["parallel.distributed_optimizer=true", pytest.param("parallel.pipeline=2", marks=pytest.mark.long)]
)
def test_a_job_that_is_suspended_as_a_whole_goes_on(run_file: Path, parallel: str, seconds: int) -> None:
    output = run_file.parent / f"suspended-{parallel[9:17]}-{seconds}"
    limits = ["resilience.hang_timeout=4", "resilience.peer_timeout=3"]
    with _start(run_file, output, 2, ENDLESS, parallel, *limits) as job:
        metrics = output / "metrics.jsonl"
        job.send(signal.SIGSTOP)
        time.sleep(seconds)
        num_lines = metrics.read_bytes().count(b"\n")
        job.send(signal.SIGCONT, 1)
        time.sleep(1.0)
        job.send(signal.SIGCONT, 0)
        _wait(lambda: metrics.read_bytes().count(b"\n") >= num_lines + 3 or not job.is_running(), job)
        time.sleep(6.0)  # longer than both limits
        job.send(signal.SIGTERM)
        assert job.wait() == 75, job.output()
    assert not (output / "stacks").exists()


def _fail_on_rank_1(rank: int) -> None:
    from megatron_cpt.data import Loader

    read = Loader.next_step

    def next_step(loader: Loader) -> object:
        data = read(loader)
        if rank == 1 and sum(data.counts.values()) >= 8 * 5:
            raise KeyError("a defect of one rank")
        return data

    Loader.next_step = next_step  # type: ignore[method-assign]


def test_a_rank_that_fails_tells_the_others_why(run_file: Path) -> None:
    output = run_file.parent / "failed"
    with _start(run_file, output, 2, ENDLESS, "parallel.pipeline=2", prepare=_fail_on_rank_1) as job:
        assert _seconds_until_others_end(job, 1) < BOUND
        (line,) = _last_lines(job, 1)
        assert "rank 1 ended in step 5: KeyError: 'a defect of one rank'" in line
        _wait(lambda: job.statuses()[1] is not None, job)
        assert job.statuses()[1] == 1
        assert "Traceback" in job.logs[1].read_text(), "a defect keeps its traceback on the rank where it happens"


def _save_slowly(rank: int) -> None:
    from megatron_cpt.train import trainer

    fast = trainer.record  # called at the start of a save

    def slow(session: object) -> object:
        marker = Path(session.output) / f"saving-{rank}"  # type: ignore[attr-defined]
        marker.touch()
        time.sleep(1.0)
        return fast(session)  # type: ignore[arg-type]

    trainer.record = slow  # type: ignore[assignment]


def test_sigterm_in_a_save_and_again_finishes_it_and_every_rank_ends_with_75(run_file: Path) -> None:
    output = run_file.parent / "terminated"
    overrides = [f"tokens={60 * 256}", "parallel.tensor=2", "checkpoint.every=7"]
    with _start(run_file, output, 2, *overrides, prepare=_save_slowly) as job:
        _wait((output / "saving-0").exists, job)
        job.send(signal.SIGTERM)
        job.send(signal.SIGTERM)
        (output / "saving-0").unlink()
        _wait((output / "saving-0").exists, job)  # the save that the signal requested
        job.send(signal.SIGTERM)
        assert job.wait() == 75
        assert job.statuses() == [75, 75]
        assert "stopped by SIGTERM: step 8 is saved" in job.output()
    assert [path.name for path in sorted((output / "checkpoints").glob("step-*"))] == ["step-00000007", "step-00000008"]
    assert newest(output).name == "step-00000008"
    assert run_ranks(2, train_here, str(run_file), [f"output={output}", *overrides, "stop_at_step=9"]) == [0, 0]


def test_sigterm_to_one_rank_stops_all_after_the_same_step_and_the_run_goes_on_to_the_bit(run_file: Path) -> None:
    whole, parts = run_file.parent / "quiet", run_file.parent / "one-signal"
    overrides = [f"tokens={30 * 256}", "parallel.pipeline=2"]
    with _start(run_file, parts, 2, *overrides, prepare=_step_slowly) as job:
        job.send(signal.SIGTERM, 1)
        assert job.wait() == 75
        assert job.statuses() == [75, 75]
    step = int(newest(parts).name.removeprefix("step-"))
    assert 3 <= step < 30
    assert read_metrics(parts)[-1]["step"] == step
    for output in (whole, parts):
        assert run_ranks(2, train_here, str(run_file), [f"output={output}", *overrides]) == [0, 0]
    assert differing(newest(whole), newest(parts)) == []


def _step_slowly(rank: int) -> None:
    from megatron_cpt.data import Loader

    read = Loader.next_step

    def next_step(loader: Loader) -> object:
        time.sleep(0.1)
        return read(loader)

    Loader.next_step = next_step  # type: ignore[method-assign]
