"""Published figures of GPUs, and the instructions of this machine's CPU."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cpt.files.whole_io import read_text

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU in its usual node of eight.

    Attributes:
        name: name in `plan --gpu`.
        memory_gib: memory that the driver reports.
        bf16: dense bf16 matrix products, FLOP/s.
        fp8: dense FP8 matrix products, FLOP/s; None without FP8.
        hbm: memory bandwidth, bytes/s.
        nvlink: bytes/s to the GPUs of its node, one direction.
        network: bytes/s to other nodes, one direction; one adapter per GPU, as in NVIDIA's DGX.
        gpus_per_node: GPUs connected by NVLink.
        is_calibrated: published training runs on this GPU set the constants of `planning/cluster/step_time.py`; other
            GPUs are assumed to reach the same shares of their peaks.
        evidence: of the speed that is predicted for a GPU that is not calibrated.
        needs_fp8_transposes: FP8 products need transposed operands (before Blackwell).
    """

    name: str
    title: str
    memory_gib: float
    bf16: float
    fp8: float | None
    hbm: float
    nvlink: float
    network: float
    gpus_per_node: int = 8
    is_calibrated: bool = False
    evidence: str = "assumed to be as efficient as an H100, not measured"
    needs_fp8_transposes: bool = True
    source: str


A100 = Gpu(
    name="a100",
    title="NVIDIA A100 80GB SXM",
    memory_gib=80.0,
    bf16=312 * TERA,
    fp8=None,
    hbm=2.039 * TERA,
    nvlink=300 * GIGA,
    network=25 * GIGA,
    source="NVIDIA A100 datasheet; DGX A100 datasheet (8 x 200 Gb/s)",
)
H100 = Gpu(
    name="h100",
    title="NVIDIA H100 80GB SXM",
    memory_gib=79.6,
    bf16=989 * TERA,
    fp8=1979 * TERA,
    hbm=3.35 * TERA,
    nvlink=450 * GIGA,
    network=50 * GIGA,
    is_calibrated=True,
    source="NVIDIA H100 datasheet (without sparsity); DGX H100 datasheet (8 x 400 Gb/s)",
)
H200 = replace(
    H100,
    name="h200",
    title="NVIDIA H200 141GB SXM",
    memory_gib=140.4,
    hbm=4.8 * TERA,
    is_calibrated=False,
    evidence="as efficient as an H100; steps on one H200 took 3 to 4 % longer",
    source="NVIDIA H200 datasheet (without sparsity); DGX H200 datasheet (8 x 400 Gb/s)",
)
B200 = Gpu(
    name="b200",
    title="NVIDIA B200 180GB SXM",
    memory_gib=179.0,
    bf16=2250 * TERA,
    fp8=4500 * TERA,
    hbm=8.0 * TERA,
    nvlink=900 * GIGA,
    network=50 * GIGA,
    needs_fp8_transposes=False,
    source="NVIDIA HGX B200 datasheet (without sparsity); DGX B200 datasheet (8 x 400 Gb/s)",
)

GPUS = {gpu.name: gpu for gpu in (A100, H100, H200, B200)}


def emulates_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True if the CPU has no instruction for matrix products in bf16; False if that is unknown.

    Args:
        cpuinfo: the kernel's list of CPUs. Their features are in a line `flags` (x86) or `Features` (ARM).
    """
    try:
        found = re.search(r"^(flags|Features)\s*:(.*)$", read_text(cpuinfo), re.MULTILINE)
    except OSError:
        return False
    return found is not None and not {"avx512_bf16", "amx_bf16", "bf16"} & set(found[2].split())
