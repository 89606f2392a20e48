"""The GPUs of a node, as nvidia-smi shows them."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed

# The old names of the reasons for low clocks: new drivers know them too (nvidia-smi --help-query-gpu).
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
_BUSY_MIB = 1024  # a context and a little; more is somebody's process


@dataclass(frozen=True)
class InstalledGpu:
    """One GPU; memory in MiB, clocks in MHz.

    Attributes:
        name, driver, memory, memory_used, max_clock: as nvidia-smi says.
        ecc_errors: memory errors since the driver was loaded that could not be corrected; None: not counted.
        slowed_by: what keeps its clock down in hardware: `thermal`, `power brake`, `hardware`.
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
    """What a node has.

    Attributes:
        gpus: in nvidia-smi's order.
        num_links: NVLinks that are up, of each; None: not known.
        problem: why there are no facts, where there should be.
    """

    gpus: tuple[InstalledGpu, ...] = ()
    num_links: tuple[int, ...] | None = None
    problem: str | None = None


def read_gpus() -> Gpus:
    """Ask nvidia-smi; a machine without it has no GPUs."""
    if shutil.which("nvidia-smi") is None:
        return Gpus()
    asked = _ask(f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    if asked.returncode != 0:
        return Gpus(problem=(asked.stdout + asked.stderr).strip())
    links = _ask("nvlink", "--status")
    return Gpus(parse_gpus(asked.stdout), parse_links(links.stdout) if links.returncode == 0 else None)


def parse_gpus(text: str) -> tuple[InstalledGpu, ...]:
    """Lines of `nvidia-smi --query-gpu` with our fields."""
    gpus = []
    for line in text.strip().splitlines():
        name, driver, total, used, clock, ecc, *slowed = (word.strip() for word in line.split(","))
        reasons = zip(("hardware", "thermal", "power brake"), slowed, strict=True)
        slowed_by = tuple(reason for reason, state in reasons if state == "Active")
        errors = int(ecc) if ecc.isdigit() else None  # "[N/A]" where the GPU has no ECC
        gpus.append(InstalledGpu(name, driver, int(total), int(used), int(clock), errors, slowed_by))
    return tuple(gpus)


def parse_links(text: str) -> tuple[int, ...]:
    """NVLinks that are up, of each GPU, from `nvidia-smi nvlink --status`."""
    counts: list[int] = []
    for line in text.splitlines():
        if line.startswith("GPU "):
            counts.append(0)
        elif line.strip().startswith("Link") and "GB/s" in line and counts:
            counts[-1] += 1
    return tuple(counts)


def check_gpus(found: Gpus, *, num_ranks: int | None, torch_sees: int) -> list[Diagnosis]:
    """Number, health and links.

    Args:
        found: the facts.
        num_ranks: that shall run on this node; None: not known.
        torch_sees: GPUs that torch can use.
    """
    if found.problem is not None:
        cost = "the driver does not answer"
        return [Diagnosis("GPUs", Level.BLOCKS, found.problem, cost, "have the driver seen to; `dmesg | grep -i nvrm`")]
    if not found.gpus:
        return [Diagnosis("GPUs", Level.NOTE, "none", "training runs on the CPU: for small models and tests")]
    return [
        _number(found.gpus, num_ranks, torch_sees),
        _alike(found.gpus),
        _free(found.gpus),
        _healthy(found.gpus),
        _links(found),
    ]


def _number(gpus: Sequence[InstalledGpu], num_ranks: int | None, torch_sees: int) -> Diagnosis:
    kinds = Counter(f"{gpu.name}, {gpu.memory / 1024:.0f} GiB" for gpu in gpus)
    found = "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) + f"; driver {gpus[0].driver}"
    if torch_sees == 0:
        way_out = "install a CUDA build of torch that this driver can run, and look at CUDA_VISIBLE_DEVICES"
        return Diagnosis(
            "GPUs", Level.BLOCKS, found, "torch can use none of them: training would run on the CPU", way_out
        )
    if num_ranks is not None and num_ranks > torch_sees:
        cost = f"{num_ranks} ranks start on this node, and torch can use {torch_sees}"
        return Diagnosis("GPUs", Level.BLOCKS, found, cost, f"--nproc-per-node {torch_sees}")
    return passed("GPUs", found)


def _alike(gpus: Sequence[InstalledGpu]) -> Diagnosis:
    if len({(gpu.name, gpu.memory, gpu.max_clock) for gpu in gpus}) > 1:
        cost = "all wait for the slowest, and the smallest memory counts"
        return Diagnosis("GPUs alike", Level.WARNING, "they differ", cost, "choose alike ones by CUDA_VISIBLE_DEVICES")
    return passed("GPUs alike", f"up to {gpus[0].max_clock} MHz")


def _free(gpus: Sequence[InstalledGpu]) -> Diagnosis:
    busy = [f"GPU {number}: {gpu.memory_used} MiB" for number, gpu in enumerate(gpus) if gpu.memory_used > _BUSY_MIB]
    if busy:
        cost = "memory is missing, and speed"
        return Diagnosis("GPUs free", Level.WARNING, ", ".join(busy), cost, "`nvidia-smi` shows whose it is")
    return passed("GPUs free", "all")


def _healthy(gpus: Sequence[InstalledGpu]) -> Diagnosis:
    broken = [f"GPU {n}: {gpu.ecc_errors} memory errors" for n, gpu in enumerate(gpus) if gpu.ecc_errors]
    if broken:
        cost = "uncorrectable: runs end there, or go wrong"
        return Diagnosis(
            "GPUs healthy", Level.BLOCKS, ", ".join(broken), cost, "take the node out; reset, or replace it"
        )
    slow = [f"GPU {n}: {' and '.join(gpu.slowed_by)}" for n, gpu in enumerate(gpus) if gpu.slowed_by]
    if slow:
        cost = "the clock is held down in hardware, and every rank waits for this one"
        return Diagnosis("GPUs healthy", Level.WARNING, ", ".join(slow), cost, "have cooling and power seen to")
    return passed("GPUs healthy", "no memory errors, clocks free")


def _links(found: Gpus) -> Diagnosis:
    links = found.num_links
    if len(found.gpus) == 1:
        return passed("NVLink", "one GPU needs none")
    if links is None or not any(links):
        cost = "tensor parallelism goes over PCIe: many times slower"
        return Diagnosis("NVLink", Level.WARNING, "none", cost, "keep parallel.tensor at 1 or 2")
    if len(set(links)) > 1:
        cost = "collectives run at the speed of the GPU with the fewest"
        return Diagnosis("NVLink", Level.WARNING, f"links up: {list(links)}", cost, "have the node seen to")
    return passed("NVLink", f"{links[0]} links a GPU")


def _ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False)
