"""Runs of an experiment as Ray tasks. Each task is `megatron-cpt experiment FILE --only ARM/seed-S` on some node.

The nodes share the file system: paths are as on this machine.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_cpt.data.ray_engine import connect_ray
from megatron_cpt.errors import EXIT_OK, EXIT_STOPPED, CptError, UserError
from megatron_cpt.experiment import child_process
from megatron_cpt.experiment.arms import Experiment, Unit

# A task would set OMP_NUM_THREADS to its CPUs, and sums of a CPU run would differ from a run of the local engine.
_VARIABLES = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}


def run_on_ray(
    experiment: Experiment, units: Sequence[Unit], *, address: str | None, jobs: int | None, tell: Callable[[str], None]
) -> int:
    """Train runs on a Ray cluster; a run that fails does not stop the others.

    Args:
        address: of the cluster; None starts Ray on this machine, for this call.
        jobs: runs at once; None: as many as the cluster has CPUs or GPUs for.
        tell: receives one line per event.

    Returns:
        0, or 75 if a run stopped after a save.

    Raises:
        UserError: there is no cluster at the address, or no node has room for a run.
        CptError: Ray did not start, or runs have failed.
    """
    with connect_ray(address, num_cpus=None, num_gpus=None):
        import ray  # by now its settings are in the environment

        _check_room(ray, experiment, units)
        statuses = _run_tasks(ray, experiment, units, jobs or len(units), tell)
    failed = [
        f"  - {name}: status {status}: {text}"
        for name, (status, text) in statuses.items()
        if status not in (EXIT_OK, EXIT_STOPPED)
    ]
    if failed:
        raise CptError("\n".join([f"{len(failed)} of {len(units)} runs failed:", *failed]))
    return EXIT_STOPPED if any(status == EXIT_STOPPED for status, _ in statuses.values()) else EXIT_OK


def _check_room(ray: Any, experiment: Experiment, units: Sequence[Unit]) -> None:
    """Raise UserError if no node has room for a run, whose task would wait forever."""
    needed = max(experiment.ranks[unit.arm] for unit in units)
    kind = "GPU" if ray.cluster_resources().get("GPU", 0) > 0 else "CPU"
    largest = max(int(node["Resources"].get(kind, 0)) for node in ray.nodes())
    if needed > largest:
        raise UserError(
            f"--engine ray: a run of {needed} ranks needs a node with {needed} {kind}s; the largest has {largest}; "
            "choose fewer ranks, or --engine slurm for runs over several nodes"
        )


def _run_tasks(
    ray: Any, experiment: Experiment, units: Sequence[Unit], jobs: int, tell: Callable[[str], None]
) -> dict[str, tuple[int, str]]:
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    path, folder = str(experiment.path), os.getcwd()
    variables = {name: os.environ.get(name, default) for name, default in _VARIABLES.items()}
    waiting = list(units)
    running: dict[Any, str] = {}
    ended: dict[str, tuple[int, str]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            unit = waiting.pop(0)
            ranks = experiment.ranks[unit.arm]
            task = ray.remote(num_cpus=ranks, num_gpus=ranks if has_gpus else 0, max_retries=0)(run_only)
            running[task.remote(path, unit.name, folder, variables)] = unit.name
        done, _ = ray.wait(list(running), num_returns=1)
        name = running.pop(done[0])
        try:
            ended[name] = ray.get(done[0])
        except ray.exceptions.RayError as error:
            ended[name] = (1, str(error).splitlines()[0])
        tell(f"[{len(ended)}/{len(units)}] {name}: ended with status {ended[name][0]}")
    return ended


def run_only(path: str, unit: str, folder: str, variables: Mapping[str, str]) -> tuple[int, str]:
    """Train one run in a process with these variables; return its exit status and its last line of output."""
    words = child_process.command(["experiment", path, "--only", unit])
    environment = {**os.environ, **variables}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    return (done.returncode if done.returncode >= 0 else 1), lines[-1] if lines else ""
