"""The programs of a run: which are here, and do they fit each other?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed

_OF_PYTHON = {"3.11": "0.16.1", "3.12": "0.19"}
"""The megatron-core that the tests run with."""


@dataclass(frozen=True)
class Software:
    """Versions of what is installed; None where it is not.

    Attributes:
        python, torch, megatron_core, transformer_engine, apex: of the packages.
        cuda: that torch was built for; None: a CPU build.
        nccl: inside torch.
        required: what our own package asks for, by name: `{"torch": ">=2.6"}`.
    """

    python: str
    torch: str | None
    megatron_core: str | None
    transformer_engine: str | None = None
    apex: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    required: tuple[tuple[str, str], ...] = ()


def read_software() -> Software:
    """What this process would run with."""
    torch_version = _version("torch")
    cuda = nccl = None
    if torch_version is not None:
        import torch

        cuda = torch.version.cuda
        if cuda is not None and torch.distributed.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    is_installed = _version("megatron-cpt") is not None  # not where the source is only on the path
    needs = [
        Requirement(line) for line in (importlib.metadata.requires("megatron-cpt") if is_installed else None) or ()
    ]
    return Software(
        python=platform.python_version(),
        torch=torch_version,
        megatron_core=_version("megatron-core"),
        transformer_engine=_version("transformer-engine") or _version("transformer_engine"),
        apex=_version("apex"),
        cuda=cuda,
        nccl=nccl,
        required=tuple((need.name, str(need.specifier)) for need in needs if need.marker is None),
    )


def check_core(software: Software) -> list[Diagnosis]:
    """Torch and megatron-core: here, and in the range that our package asks for."""
    ranges = dict(software.required)
    findings = []
    for name, found in (("torch", software.torch), ("megatron-core", software.megatron_core)):
        if found is None:
            findings.append(Diagnosis(name, Level.BLOCKS, "not installed", "nothing can run", f"pip install {name}"))
        elif not _fits(found, ranges.get(name, "")):
            cost = f"outside of {ranges[name]}, which this package is made for"
            findings.append(Diagnosis(name, Level.BLOCKS, found, cost, f"pip install '{name}{ranges[name]}'"))
        elif name == "torch":
            findings.append(passed(name, f"{found}, CUDA {software.cuda}" if software.cuda else f"{found}, for CPUs"))
        else:
            findings.append(_tested_core(found, software.python))
    return findings


def check_transformer_engine(software: Software, *, has_gpu: bool) -> Diagnosis:
    """Transformer Engine decides about kernels and FP8; it is of no use without a GPU."""
    name = "Transformer Engine"
    if software.transformer_engine is not None:
        return passed(
            name, software.transformer_engine if has_gpu else f"{software.transformer_engine}, unused on a CPU"
        )
    if not has_gpu:
        return passed(name, "not installed, not needed on a CPU")
    return Diagnosis(
        name,
        Level.NOTE,
        "not installed",
        "the local layer spec runs: no FP8, no fused attention, no overlap of tensor-parallel communication, "
        "no context parallelism",
        "take NVIDIA's PyTorch container (Dockerfile), or pip install 'megatron-cpt[gpu]'",
    )


def check_apex(software: Software, *, has_gpu: bool) -> Diagnosis:
    """Apex brings fused kernels that Transformer Engine has as well."""
    if software.apex is not None:
        return passed("apex", software.apex)
    if not has_gpu or software.transformer_engine is not None:
        return passed("apex", "not installed, not needed here")
    return Diagnosis(
        "apex",
        Level.NOTE,
        "not installed, nor Transformer Engine",
        "Adam runs as torch's, gradients are not added up inside the matrix product",
        "take NVIDIA's PyTorch container, which has both",
    )


def check_nccl(software: Software, *, has_gpu: bool) -> Diagnosis:
    """GPUs talk through NCCL."""
    if software.nccl is not None:
        return passed("NCCL", software.nccl)
    if not has_gpu:
        return passed("NCCL", "none, not needed on a CPU: gloo")
    return Diagnosis(
        "NCCL", Level.BLOCKS, "torch has none", "GPUs cannot talk to each other", "install a CUDA build of torch"
    )


def _tested_core(found: str, python: str) -> Diagnosis:
    tested = _OF_PYTHON.get(".".join(python.split(".")[:2]))
    if tested is None or found.startswith(tested):
        return passed("megatron-core", found)
    cost = f"not tried with Python {python}: the tests run with {tested} there"
    return Diagnosis("megatron-core", Level.NOTE, found, cost, "run `make test` once here")


def _fits(found: str, wanted: str) -> bool:
    if not wanted:
        return True
    try:
        version = Version(found)
    except InvalidVersion:
        return True  # a build of somebody's own: not ours to judge
    return Requirement(f"x{wanted}").specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
