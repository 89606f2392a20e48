"""Runs of an experiment as Ray tasks. Each task is `megatron-cpt experiment FILE --only ARM/seed-S` on some node.

The nodes share the file system: paths are as on this machine.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from megatron_cpt.errors import EXIT_OK, EXIT_STOPPED, CptError, UserError
from megatron_cpt.experiment import child_process
from megatron_cpt.experiment.arms import Experiment, Unit

_STARTS = 3


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
    import ray

    _connect(ray, address)
    try:
        _check_room(ray, experiment, units)
        statuses = _run_tasks(ray, experiment, units, jobs or len(units), tell)
    finally:
        ray.shutdown()
    failed = [
        f"  - {name}: status {status}: {text}"
        for name, (status, text) in statuses.items()
        if status not in (EXIT_OK, EXIT_STOPPED)
    ]
    if failed:
        raise CptError("\n".join([f"{len(failed)} of {len(units)} runs failed:", *failed]))
    return EXIT_STOPPED if any(status == EXIT_STOPPED for status, _ in statuses.values()) else EXIT_OK


def _connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one on this machine, for which Ray allows its processes 30 seconds."""
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    variables = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    # Ray would set it to the CPUs of a task, and sums of a CPU run would differ from a run of the local engine.
    variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    for start in range(1, _STARTS + 1):
        try:
            ray.init(log_to_driver=False, logging_level="error", runtime_env={"env_vars": variables}, **options)
            return
        except Exception as error:  # Ray raises plain exceptions if its processes do not come up
            ray.shutdown()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if address is not None:
                raise UserError(f"--ray-address {address}: no connection to a Ray cluster: {reason}") from error
            if start == _STARTS:
                raise CptError(
                    f"Ray did not start in {_STARTS} attempts: {reason}; the machine may be too busy: try again, use "
                    "--engine local, or name a running cluster with --ray-address"
                ) from error


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
    waiting = list(units)
    running: dict[Any, str] = {}
    ended: dict[str, tuple[int, str]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            unit = waiting.pop(0)
            ranks = experiment.ranks[unit.arm]
            task = ray.remote(num_cpus=ranks, num_gpus=ranks if has_gpus else 0, max_retries=0)(run_only)
            running[task.remote(path, unit.name, folder)] = unit.name
        done, _ = ray.wait(list(running), num_returns=1)
        name = running.pop(done[0])
        try:
            ended[name] = ray.get(done[0])
        except ray.exceptions.RayError as error:
            ended[name] = (1, str(error).splitlines()[0])
        tell(f"[{len(ended)}/{len(units)}] {name}: ended with status {ended[name][0]}")
    return ended


def run_only(path: str, unit: str, folder: str) -> tuple[int, str]:
    """Train one run in a process of its own; return its exit status and its last line of output."""
    words = child_process.command(["experiment", path, "--only", unit])
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    return (done.returncode if done.returncode >= 0 else 1), lines[-1] if lines else ""
