"""The launcher's variables: which rank this process is, of how many."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_cpt.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets for every rank."""

_LAST_PORT = 65535
_START = "start the ranks with `megatron-cpt launch` or torchrun"


@dataclass(frozen=True)
class LaunchedRank:
    """Place of this process in a job.

    Attributes:
        rank, world_size: over all processes.
        local_rank: among the processes of this machine; the number of its GPU.
        has_launcher: False for a process that runs alone without a launcher.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    has_launcher: bool = False


def read_launcher(environment: Mapping[str, str] = os.environ) -> LaunchedRank:
    """Read the launcher's variables: either all of them are set, or the process is a job of its own.

    Some of them alone would be silently wrong: with WORLD_SIZE=4 and no RANK, one process would train on a quarter of
    every batch. MASTER_ADDR and MASTER_PORT alone are harmless; job scripts export them before they start a launcher.

    Raises:
        UserError: some variables are missing, not numbers, or contradict each other; or SLURM started several tasks
            without a launcher.
    """
    present = [name for name in VARIABLES if environment.get(name)]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(present):
        _refuse_several_tasks(environment)
        return LaunchedRank()
    missing = [name for name in VARIABLES if name not in present]
    if missing:
        raise UserError(
            f"environment: {', '.join(present)} set, but not {', '.join(missing)}; {_START}, or unset "
            f"{' '.join(name for name in present if not name.startswith('MASTER'))} for a run of one process"
        )
    rank, world_size, local_rank, port = (
        _number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    if world_size < 1 or rank >= world_size:
        raise UserError(
            f"environment: RANK={rank} in WORLD_SIZE={world_size}; ranks count from 0 to WORLD_SIZE - 1: {_START}"
        )
    if port > _LAST_PORT:
        raise UserError(f"environment: MASTER_PORT={port}: ports end at {_LAST_PORT}; {_START}")
    return LaunchedRank(rank, world_size, local_rank, has_launcher=True)


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise UserError(f"environment: {name}={environment[name]}: not a number from 0 on; {_START}")
    return int(environment[name])


def _refuse_several_tasks(environment: Mapping[str, str]) -> None:
    # srun's variable. A batch script has SLURM_PROCID=0 and SLURM_NTASKS=8 too, but there is one of it (sbatch(1)).
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise UserError(
            f"environment: SLURM started {tasks} tasks without a launcher, and each would train the whole run alone; "
            "start one task per node that runs `megatron-cpt launch --nproc-per-node GPUS ... -- train RUN.yaml` "
            "(docs/operations/slurm.md), or one task alone: srun --ntasks 1"
        )
