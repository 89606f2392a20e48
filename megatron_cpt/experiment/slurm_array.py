"""An experiment as a SLURM job array: one task per run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_cpt.errors import UserError
from megatron_cpt.experiment.arms import Experiment, Unit
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.jsonl_log import write_errors_as_cpt_errors

SCRIPT_FILE = "experiment.sbatch"


def write_array(experiment: Experiment, units: Sequence[Unit], *, jobs: int | None) -> tuple[Path, str]:
    """Write the batch script of the runs into the experiment's folder.

    Args:
        jobs: tasks at once; None: as many as SLURM starts.

    Returns:
        The script, and the command that submits it.

    Raises:
        UserError: the nodes per run do not divide its ranks.
        CptError: the script cannot be written.
    """
    nodes = experiment.config.slurm.nodes
    for arm, ranks in experiment.ranks.items():
        if ranks % nodes:
            raise UserError(f"slurm.nodes: {nodes} nodes do not divide the {ranks} ranks of arm {arm}; choose others")
    path = experiment.output / SCRIPT_FILE
    with write_errors_as_cpt_errors(path):
        (experiment.output / "logs").mkdir(parents=True, exist_ok=True)
        write_atomically(path, "\n".join(_lines(experiment, units, jobs)) + "\n")
    return path, f"sbatch {shlex.quote(str(path))}"


def _lines(experiment: Experiment, units: Sequence[Unit], jobs: int | None) -> Iterator[str]:
    slurm = experiment.config.slurm
    logs = experiment.output / "logs"
    at_once = f"%{jobs}" if jobs else ""
    options = [
        f"--job-name={shlex.quote(experiment.config.name)}",
        f"--array=0-{len(units) - 1}{at_once}",
        f"--nodes={slurm.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={slurm.gpus_per_node}"] if slurm.gpus_per_node else []),
        f"--time={slurm.time}",
        f"--output={logs}/%x-%A-%a.log",
        # As examples/nemotron4_15b/train.sbatch: SIGUSR1 goes to the job step ten minutes before the time limit, the
        # runs save and end with 75, and the task returns to the queue.
        "--requeue",
        "--open-mode=append",
        "--signal=USR1@600",
        *slurm.options,
    ]
    yield "#!/usr/bin/env bash"
    yield f"# Written by `megatron-cpt experiment {experiment.path} --engine slurm`: one task per run. Submit it from"
    yield f"# {Path.cwd()}, because paths in run.yaml are relative to it."
    yield from (f"#SBATCH {option}" for option in options)
    yield "set -uo pipefail"
    yield f"cd {shlex.quote(os.getcwd())}"
    yield from slurm.setup
    yield "units=("
    yield from (f"    {shlex.quote(unit.name)}" for unit in units)
    yield ")"
    if slurm.nodes > 1:
        yield 'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")'
        yield 'export CPT_HEAD="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))"'
        yield 'export CPT_JOB="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"'
    yield 'srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \\'
    only = f"{shlex.quote(sys.executable)} -m megatron_cpt experiment {shlex.quote(str(experiment.path))}"
    yield f'    {only} --only "${{units[$SLURM_ARRAY_TASK_ID]}}"'
    yield "status=$?"
    # A canceled task also ends with 75, but its state is no longer RUNNING.
    yield 'state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)'
    yield 'if [[ $status == 75 && $state == RUNNING ]]; then scontrol requeue "$SLURM_JOB_ID"; fi'
    yield 'exit "$status"'
