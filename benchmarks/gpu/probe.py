"""Unpack the bundle into the site folder; record device, driver, clocks, versions, disks, and if the libraries load.

python -m benchmarks.gpu.probe
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from benchmarks.gpu.measured import Report, run_item

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "numpy", "nvidia-cudnn-cu13", "nvidia-nccl-cu13")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
IMPORTED = ("megatron.core", "transformer_engine.pytorch", "megatron_cpt.train.trainer")
SLOW_IMPORT, SLOW_IMPORT_IN_REHEARSAL = 60.0, 600.0


def measure(report: Report) -> None:
    """Unpack, then probe; a library that does not load is a figure, not an error."""
    if report.arguments.bundle is not None:
        started = time.perf_counter()
        report.note(bundle=_unpack(report), unpack_seconds=time.perf_counter() - started)
    report.note(
        python=platform.python_version(),
        cores=os.cpu_count(),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        free_disk_gib=shutil.disk_usage(report.work).free / 2**30,
        free_shared_memory_gib=shutil.disk_usage("/dev/shm").free / 2**30,
        versions=_versions(),
        nvidia_smi=_nvidia_smi(),
        imports=_imports(SLOW_IMPORT_IN_REHEARSAL if report.is_rehearsal else SLOW_IMPORT),
    )
    import torch

    is_gpu = torch.cuda.is_available()
    report.note(device=torch.cuda.get_device_name() if is_gpu else f"CPU ({platform.machine()})")
    if is_gpu:
        properties = torch.cuda.get_device_properties(0)
        report.note(
            compute_capability=list(torch.cuda.get_device_capability()),
            multiprocessors=properties.multi_processor_count,
            device_memory_gib=properties.total_memory / 2**30,
            cuda=torch.version.cuda,
        )


def _unpack(report: Report) -> dict[str, str]:
    """Unpack the bundle; return the version of each package in it."""
    from tools.dev.gpu_site import unpack

    versions = unpack(report.arguments.bundle, report.arguments.site)
    importlib.invalidate_caches()  # the folder is on the path since before it existed
    return versions


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _nvidia_smi() -> dict[str, str] | str:
    """Return what the driver reports, or why it reports nothing."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return dict(zip(QUERY.split(","), done.stdout.strip().split(", "), strict=False))


def _imports(limit: float) -> dict[str, Any]:
    """Return the seconds that the import of each library takes, or its error; side by side."""
    with ThreadPoolExecutor() as threads:
        found = threads.map(partial(_import, limit=limit), IMPORTED)
        return dict(zip(IMPORTED, found, strict=True))


def _import(name: str, *, limit: float) -> dict[str, Any]:
    """Import a library in a process of its own, because a library that does not fit may end the process."""
    started = time.perf_counter()
    setup = "from megatron_cpt.backend import cpu; cpu.install(); " if name.startswith("megatron") else ""
    command = [sys.executable, "-c", f"{setup}import {name}"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:g} s"}
    last = (done.stderr.strip().splitlines() or [""])[-1][:300]
    error = {} if done.returncode == 0 else {"error": f"exit status {done.returncode}: {last}"}
    return {"seconds": round(time.perf_counter() - started, 2), **error}


if __name__ == "__main__":
    sys.exit(run_item(measure))
