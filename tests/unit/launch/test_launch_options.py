"""Options and exit status of the launcher."""

from __future__ import annotations

import socket

import pytest

import megatron_cpt.launch
from megatron_cpt.backend.signals import STOP_SIGNALS
from megatron_cpt.cli import main
from megatron_cpt.errors import UserError
from megatron_cpt.launch import check_options, check_port, rank_report, with_defaults
from megatron_cpt.launch.rank_report import Report
from megatron_cpt.launch.supervise import combine


@pytest.mark.parametrize(
    ("statuses", "is_failure", "combined"),
    [
        ([0, 0], False, 0),
        ([0, 75], False, 75),
        ([75, None], True, 1),
        ([75, 9], False, 1),
        ([None, 3], True, 3),
        ([3, 2], False, 2),
        ([1, 0], False, 1),
    ],
)
def test_one_status_for_a_node(statuses: list[int | None], is_failure: bool, combined: int) -> None:
    reports = [Report(pid, status) for pid, status in enumerate(statuses, start=1)]
    for is_stop_requested in (False, True):  # a run also stops for max_wall_time, or for a signal to another node
        assert combine(reports, is_failure=is_failure, is_stop_requested=is_stop_requested) == combined


def test_a_stop_before_training_counts_only_if_the_launcher_was_asked() -> None:
    reports = [Report(1, 75, is_early=True), Report(2)]
    assert combine(reports, is_failure=False, is_stop_requested=True) == 75
    assert combine(reports, is_failure=False, is_stop_requested=False) == 1
    assert combine(reports, is_failure=True, is_stop_requested=True) == 1


def test_one_node_needs_no_port_of_its_own() -> None:
    assert with_defaults(["--nproc-per-node=8"], {}) == ["--standalone", "--nproc-per-node=8"]
    assert with_defaults(["--nnodes", "2"], {}) == ["--nnodes", "2"]
    assert with_defaults(["--rdzv_endpoint=a:1"], {}) == ["--rdzv_endpoint=a:1"]
    assert with_defaults([], {"PET_NNODES": "2"}) == []
    assert with_defaults(["--nnodes=2", "--log-dir=x"], {}) == ["--tee", "3", "--nnodes=2", "--log-dir=x"]
    assert with_defaults(["--nnodes=2", "--log-dir=x", "-r", "3"], {}) == ["--nnodes=2", "--log-dir=x", "-r", "3"]


@pytest.mark.parametrize("option", ["-m", "--module", "--no-python", "--signals_to_handle=SIGINT"])
def test_what_the_launcher_needs_is_refused(option: str) -> None:
    with pytest.raises(UserError, match="is not supported"):
        check_options(["--nnodes", "2", option])


def test_the_rank_knows_the_signals_that_training_handles() -> None:
    assert set(rank_report.STOP_SIGNALS) == set(STOP_SIGNALS)


def test_options_and_command_are_parted_at_the_first_double_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        megatron_cpt.launch, "supervise", lambda options, command: seen.extend([options, command]) or 75
    )
    words = ["--nnodes", "2", "--tee=3", "--", "train", "run.yaml", "seed=2", "--allow", "blend", "--", "x"]
    assert main(["launch", *words]) == 75
    assert seen == [["--nnodes", "2", "--tee=3"], ["train", "run.yaml", "seed=2", "--allow", "blend", "--", "x"]]


@pytest.mark.parametrize("words", [["--nnodes=2"], ["--nnodes=2", "--"], ["--nnodes=2", "--", "plan", "run.yaml"]])
def test_a_command_that_ranks_run_is_needed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *words]) == 2
    assert "give the command after --" in capsys.readouterr().err


def test_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--help"]) == 0
    assert "torchrun options" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spelling", ["--master-port {}", "--master_port={}", "--nnodes 2 --node-rank=0 --master-port {}"]
)
def test_a_port_in_use_is_named(spelling: str) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=rf"--master-port {port}: Address already in use; choose another one"):
            check_port(spelling.format(port).split())
        check_port(["--node-rank", "1", f"--master-port={port}"])  # that node does not open it
    check_port([f"--master-port={port}"])
