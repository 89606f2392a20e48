"""The launcher's variables: all of them or none."""

from __future__ import annotations

import pytest

from megatron_cpt.config.launcher import VARIABLES, LaunchedRank, read_launcher
from megatron_cpt.errors import UserError

COMPLETE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_a_process_without_variables_is_alone() -> None:
    assert read_launcher({}) == LaunchedRank(0, 1, 0, has_launcher=False)
    assert read_launcher({"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}) == LaunchedRank()


def test_all_variables_are_read() -> None:
    assert read_launcher(COMPLETE) == LaunchedRank(3, 4, 1, has_launcher=True)


@pytest.mark.parametrize("name", VARIABLES)
def test_one_missing_variable_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"but not {name}; start the ranks with `megatron-cpt launch`"):
        read_launcher({key: value for key, value in COMPLETE.items() if key != name})
    with pytest.raises(UserError, match=f"but not {name}"):
        read_launcher({**COMPLETE, name: ""})


def test_world_size_alone_is_refused() -> None:
    with pytest.raises(UserError, match="unset WORLD_SIZE for a run of one process"):
        read_launcher({"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("WORLD_SIZE", "many", "WORLD_SIZE=many: not a number"),
        ("RANK", "-1", "RANK=-1: not a number"),
        ("MASTER_PORT", "x", "MASTER_PORT=x: not a number"),
        ("MASTER_PORT", "65536", "MASTER_PORT=65536: ports end at 65535"),
        ("RANK", "4", "RANK=4 in WORLD_SIZE=4"),
        ("WORLD_SIZE", "0", "RANK=3 in WORLD_SIZE=0"),
    ],
)
def test_values_that_cannot_be_are_refused(name: str, value: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read_launcher({**COMPLETE, name: value})


def test_tasks_of_slurm_without_a_launcher_are_refused() -> None:
    task = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}
    with pytest.raises(UserError, match=r"SLURM started 8 tasks .*megatron-cpt launch"):
        read_launcher(task)
    with pytest.raises(UserError, match="SLURM started 2 tasks"):
        read_launcher({**task, "SLURM_STEP_NUM_TASKS": "2"})
    assert read_launcher({**task, "SLURM_STEP_NUM_TASKS": "1"}) == LaunchedRank()
    assert read_launcher({"SLURM_NTASKS": "8"}) == LaunchedRank(), "a shell inside an allocation"
    assert read_launcher({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == LaunchedRank(), "a batch script"
    assert read_launcher({**task, **COMPLETE}).world_size == 4
