"""The launcher with real torchrun agents and stand-in ranks: statuses, restarts, signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import small_run
from tests.helpers.slurm import free_port

_PATIENCE = 600  # seconds; only a hang takes so long, on however busy a machine

LAUNCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
from megatron_cpt.launch import supervise
options, behaviors = sys.argv[2:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:]
sys.exit(supervise(["--standalone", "--nproc-per-node", "2", *options], [sys.argv[1], *behaviors],
                   module="tests.helpers.stand_in_rank", grace=1.0))
"""

LAUNCHER = [sys.executable, "-m", "megatron_cpt", "launch"]


def _start(folder: Path, *behaviors: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(folder), *options, "--", *behaviors],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_ranks(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while len(list(folder.glob("started-*"))) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("behaviors", "status"),
    [
        (("0:75", "1:0"), 75),
        pytest.param(("0:75", "1:75"), 75, marks=pytest.mark.long),
        pytest.param(("0:3", "1:3"), 3, marks=pytest.mark.long),
    ],
)
def test_the_status_of_the_ranks_gets_through_and_nothing_is_started_again(
    tmp_path: Path, behaviors: tuple[str, ...], status: int
) -> None:
    process = _start(tmp_path, *behaviors, options=("--max-restarts", "2"))
    out, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == status, err
    assert out.count("in attempt 0") == 2
    assert "attempt 1" not in out


@pytest.mark.long  # the next test restarts two ranks for real
def test_a_fault_is_started_again_and_the_last_attempt_counts(tmp_path: Path) -> None:
    process = _start(tmp_path, "0:0", "1:fault", options=("--max-restarts", "1"))
    out, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 0, err
    assert "rank 1 of 2 in attempt 1" in out


def test_ranks_of_a_restart_connect_to_each_other(tmp_path: Path) -> None:
    """They read the addresses of the killed ranks before, because torchrun's agent kept the store."""
    program = LAUNCH.replace("tests.helpers.stand_in_rank", "tests.helpers.restarting_rank")
    command = [sys.executable, "-c", program, str(tmp_path), "--max-restarts", "1", "--"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("connected in attempt 1") == 2


@pytest.mark.long
def test_a_fault_without_restarts_is_1(tmp_path: Path) -> None:
    process = _start(tmp_path, "0:0", "1:fault")
    _, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 1
    assert "exitcode  : 9" in err


def test_ranks_that_wait_for_a_mistaken_one_are_ended(tmp_path: Path) -> None:
    process = _start(tmp_path, "0:2", "1:wait", options=("--max-restarts", "3"))
    _, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 2
    assert "a rank has ended, and the others wait for it: killing 1 rank" in err


def test_a_stop_signal_to_every_process_of_the_step_lets_the_ranks_save(tmp_path: Path) -> None:
    number = signal.SIGUSR1
    process = _start(tmp_path, "0:stop", "1:stop", options=("--max-restarts", "3"))
    _wait_for_ranks(tmp_path, process)
    (agent,) = psutil.Process(process.pid).children()
    agent.send_signal(number)  # as SLURM does; torchrun alone would end its ranks, or itself
    process.send_signal(number)
    out, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 75, err
    assert "in attempt 1" not in out
    assert f"launch: received {number.name}" in err
    assert "could be saved" not in err


def test_a_signal_before_the_ranks_listen_ends_them_with_75(tmp_path: Path) -> None:
    process = _start(tmp_path, "0:wait", "1:wait")
    _wait_for_ranks(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 75, err
    assert "launch: stopped before a checkpoint could be saved; run the same command again" in err


@pytest.mark.long  # the next test sends the same signal
def test_ctrl_c_saves_and_ends_with_75(tmp_path: Path) -> None:
    process = _start(tmp_path, "0:stop", "1:stop", options=("--max-restarts", "2"))
    _wait_for_ranks(tmp_path, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 75, err
    assert "attempt 1" not in out
    assert "received SIGINT; ranks that train save a checkpoint, and all end; press Ctrl-C again to end" in err


def test_ctrl_c_that_also_ends_the_reader_of_stderr_reaches_the_ranks(tmp_path: Path) -> None:
    process = _start(tmp_path, "0:stop", "1:stop")
    _wait_for_ranks(tmp_path, process)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(timeout=_PATIENCE) == 75


def test_a_second_ctrl_c_kills_the_ranks_and_ends_with_130(tmp_path: Path) -> None:
    process = _start(tmp_path, "0:deaf", "1:deaf")
    _wait_for_ranks(tmp_path, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("press Ctrl-C again" in line for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 130, err
    assert "Ctrl-C came twice: killing 2 ranks" in err
    assert psutil.wait_procs(family, timeout=_PATIENCE)[1] == []


@pytest.mark.long
def test_a_rank_that_torchrun_ends_after_a_failure_is_not_a_requested_stop(tmp_path: Path) -> None:
    # Rank 0 is still starting when rank 1 fails; rank 2 keeps torchrun waiting for longer than the grace period.
    process = _start(tmp_path, "0:wait", "1:fault", "2:linger", options=("--nproc-per-node", "3"))
    _, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 1, err
    assert "wait for it" not in err


def test_a_rank_that_was_killed_is_a_failure_even_if_torchrun_has_not_noticed(tmp_path: Path) -> None:
    process = _start(tmp_path, "0:wait", "1:wait")
    _wait_for_ranks(tmp_path, process)
    (agent,) = psutil.Process(process.pid).children()
    ranks = {child.environ().get("RANK"): child for child in agent.children()}
    agent.suspend()
    ranks["1"].kill()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 1, err
    assert "the others wait for it: killing 0 ranks" in err


@pytest.mark.long  # two launchers, two agents and two ranks import torch
def test_doctor_on_two_nodes_compares_them(tmp_path: Path) -> None:
    run, endpoint = small_run(tmp_path), f"localhost:{free_port()}"
    rendezvous = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        endpoint,
        "--rdzv-id",
        "two",
    ]
    agents = [
        subprocess.Popen(
            [
                *LAUNCHER,
                *rendezvous,
                "--rdzv-conf",
                f"is_host={number}",
                "--",
                "doctor",
                str(run),
                "--json",
                f"name={name}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for number, name in ((1, "small"), (0, "other"))
    ]
    reports = [agent.communicate(timeout=_PATIENCE)[0] for agent in agents]
    found = json.loads(max(reports, key=len))  # of the rank 0, which need not be on the first node
    assert sorted(map(len, reports))[0] == 0
    assert len(found["nodes"]) == 2
    together = {finding["check"]: finding for finding in found["together"]}
    assert together["same programs"]["level"] == "ok"
    assert together["same run"]["level"] == "blocks"
    assert together["same run"]["found"].endswith(": run.yaml")
    assert [agent.returncode for agent in agents] == [1, 1]
