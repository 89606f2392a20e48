"""Checks of a node's GPUs, from the output of nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed

# New drivers still accept the old names of the last three fields (nvidia-smi --help-query-gpu).
_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.max.sm",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
)
_BUSY_MIB = 1024  # more than a CUDA context: another process uses the GPU


@dataclass(frozen=True)
class InstalledGpu:
    """One GPU as nvidia-smi describes it.

    Attributes:
        memory, memory_used: MiB.
        max_clock: MHz.
        ecc_errors: uncorrectable memory errors since the driver was loaded; None: not counted.
        slowed_by: hardware reasons for a low clock: `thermal`, `power brake`, `hardware`.
    """

    name: str
    driver: str
    memory: int
    memory_used: int
    max_clock: int
    ecc_errors: int | None = None
    slowed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpus:
    """GPUs of a node.

    Attributes:
        gpus: in the order of nvidia-smi.
        num_links: active NVLinks per GPU; None: unknown.
        problem: error message of nvidia-smi, or None.
    """

    gpus: tuple[InstalledGpu, ...] = ()
    num_links: tuple[int, ...] | None = None
    problem: str | None = None


def read_gpus() -> Gpus:
    """Run nvidia-smi; a machine without it has no GPUs."""
    if shutil.which("nvidia-smi") is None:
        return Gpus()
    queried = _nvidia_smi(f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    if queried.returncode != 0:
        return Gpus(problem=(queried.stdout + queried.stderr).strip())
    links = _nvidia_smi("nvlink", "--status")
    return Gpus(parse_gpus(queried.stdout), parse_links(links.stdout) if links.returncode == 0 else None)


def parse_gpus(text: str) -> tuple[InstalledGpu, ...]:
    """Parse the output of `nvidia-smi --query-gpu` with `_FIELDS`."""
    gpus = []
    for line in text.strip().splitlines():
        name, driver, total, used, clock, ecc, *slowed = (word.strip() for word in line.split(","))
        reasons = zip(("hardware", "thermal", "power brake"), slowed, strict=True)
        slowed_by = tuple(reason for reason, state in reasons if state == "Active")
        errors = int(ecc) if ecc.isdigit() else None  # "[N/A]" where the GPU has no ECC
        gpus.append(InstalledGpu(name, driver, int(total), int(used), int(clock), errors, slowed_by))
    return tuple(gpus)


def parse_links(text: str) -> tuple[int, ...]:
    """Count the active NVLinks per GPU in the output of `nvidia-smi nvlink --status`."""
    counts: list[int] = []
    for line in text.splitlines():
        if line.startswith("GPU "):
            counts.append(0)
        elif line.strip().startswith("Link") and "GB/s" in line and counts:
            counts[-1] += 1
    return tuple(counts)


def check_gpus(found: Gpus, *, num_ranks: int | None, num_usable: int) -> list[Diagnosis]:
    """Check the number, health and links of the GPUs.

    Args:
        num_ranks: ranks of the run on this node; None: unknown.
        num_usable: number of GPUs that torch can use.
    """
    if found.problem is not None:
        cost = "the driver does not answer"
        return [Diagnosis("GPUs", Level.BLOCKS, found.problem, cost, "repair the driver; see `dmesg | grep -i nvrm`")]
    if not found.gpus:
        return [
            Diagnosis("GPUs", Level.NOTE, "none", "training runs on the CPU, fast enough for small models and tests")
        ]
    return [
        _check_number(found.gpus, num_ranks, num_usable),
        _check_same_model(found.gpus),
        _check_unused(found.gpus),
        _check_health(found.gpus),
        _check_links(found),
    ]


def _check_number(gpus: Sequence[InstalledGpu], num_ranks: int | None, num_usable: int) -> Diagnosis:
    kinds = Counter(f"{gpu.name}, {gpu.memory / 1024:.0f} GiB" for gpu in gpus)
    found = "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) + f"; driver {gpus[0].driver}"
    if num_usable == 0:
        way_out = "install a CUDA build of torch that this driver supports, and check CUDA_VISIBLE_DEVICES"
        return Diagnosis(
            "GPUs", Level.BLOCKS, found, "torch can use none of them: training would run on the CPU", way_out
        )
    if num_ranks is not None and num_ranks > num_usable:
        cost = f"{num_ranks} ranks start on this node, and torch can use {num_usable}"
        return Diagnosis("GPUs", Level.BLOCKS, found, cost, f"--nproc-per-node {num_usable}")
    return passed("GPUs", found)


def _check_same_model(gpus: Sequence[InstalledGpu]) -> Diagnosis:
    if len({(gpu.name, gpu.memory, gpu.max_clock) for gpu in gpus}) > 1:
        cost = "every rank waits for the slowest GPU, and the smallest memory limits all"
        return Diagnosis(
            "GPUs alike", Level.WARNING, "they differ", cost, "select equal ones with CUDA_VISIBLE_DEVICES"
        )
    return passed("GPUs alike", f"up to {gpus[0].max_clock} MHz")


def _check_unused(gpus: Sequence[InstalledGpu]) -> Diagnosis:
    busy = [f"GPU {number}: {gpu.memory_used} MiB" for number, gpu in enumerate(gpus) if gpu.memory_used > _BUSY_MIB]
    if busy:
        cost = "another process takes memory and speed"
        return Diagnosis("GPUs free", Level.WARNING, ", ".join(busy), cost, "`nvidia-smi` lists the processes")
    return passed("GPUs free", "all")


def _check_health(gpus: Sequence[InstalledGpu]) -> Diagnosis:
    faulty = [f"GPU {n}: {gpu.ecc_errors} memory errors" for n, gpu in enumerate(gpus) if gpu.ecc_errors]
    if faulty:
        cost = "uncorrectable: a run crashes or computes wrong numbers"
        way_out = "remove the node from the job; reset or replace the GPU"
        return Diagnosis("GPUs healthy", Level.BLOCKS, ", ".join(faulty), cost, way_out)
    slow = [f"GPU {n}: {' and '.join(gpu.slowed_by)}" for n, gpu in enumerate(gpus) if gpu.slowed_by]
    if slow:
        cost = "the hardware lowers the clock, and every rank waits for this GPU"
        return Diagnosis("GPUs healthy", Level.WARNING, ", ".join(slow), cost, "check cooling and power")
    return passed("GPUs healthy", "no memory errors, clocks free")


def _check_links(found: Gpus) -> Diagnosis:
    links = found.num_links
    if len(found.gpus) == 1:
        return passed("NVLink", "one GPU needs none")
    if links is None or not any(links):
        cost = "tensor parallelism uses PCIe: many times slower"
        return Diagnosis("NVLink", Level.WARNING, "none", cost, "keep parallel.tensor at 1 or 2")
    if len(set(links)) > 1:
        cost = "collectives run at the speed of the GPU with the fewest"
        way_out = "check the node with `nvidia-smi nvlink --status`"
        return Diagnosis("NVLink", Level.WARNING, f"links up: {list(links)}", cost, way_out)
    return passed("NVLink", f"{links[0]} links per GPU")


def _nvidia_smi(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False)
