"""Checks of the installed packages and their versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed
from megatron_cpt.errors import install_command

_TESTED_CORE = {"3.11": "0.16.1", "3.12": "0.19"}
"""Version of megatron-core in our tests, per Python version."""


@dataclass(frozen=True)
class Software:
    """Installed versions; None for a package that is not installed.

    Attributes:
        cuda: CUDA version of the torch build; None: a CPU build.
        nccl: NCCL version of the torch build.
        required: requirements of the extra `train`, such as `("torch", ">=2.6")`.
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
    """Read the versions of the packages that this process would import."""
    torch_version = _version("torch") if importlib.util.find_spec("torch") else None
    cuda = nccl = None
    if torch_version is not None:
        import torch

        cuda = torch.version.cuda
        if cuda is not None and torch.distributed.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    is_installed = _version("megatron-cpt") is not None  # False if the source is only on PYTHONPATH
    lines = importlib.metadata.requires("megatron-cpt") if is_installed else None
    requirements = [Requirement(line) for line in lines or ()]
    return Software(
        python=platform.python_version(),
        torch=torch_version,
        megatron_core=_version("megatron-core"),
        transformer_engine=_version("transformer-engine") or _version("transformer_engine"),
        apex=_version("apex"),
        cuda=cuda,
        nccl=nccl,
        required=tuple(
            (requirement.name, str(requirement.specifier))
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": "train"})
        ),
    )


def check_core(software: Software) -> list[Diagnosis]:
    """Check that torch and megatron-core are installed in the versions that setup.py allows."""
    ranges = dict(software.required)
    findings = []
    for name, found in (("torch", software.torch), ("megatron-core", software.megatron_core)):
        if found is None:
            way_out = install_command("train")
            findings.append(Diagnosis(name, Level.BLOCKS, "not installed", "no run can start", way_out))
        elif not _fits(found, ranges.get(name, "")):
            cost = f"outside of the supported range {ranges[name]}"
            findings.append(Diagnosis(name, Level.BLOCKS, found, cost, f"pip install '{name}{ranges[name]}'"))
        elif name == "torch":
            findings.append(passed(name, f"{found}, CUDA {software.cuda}" if software.cuda else f"{found}, CPU build"))
        else:
            findings.append(_tested_core(found, software.python))
    return findings


def check_transformer_engine(software: Software, *, has_gpu: bool) -> Diagnosis:
    """Check Transformer Engine, which gives GPUs fused kernels and FP8."""
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
        "the local layer spec is used: FP8 and attention by torch without fused norms, no overlap of tensor-parallel "
        "communication, no context parallelism",
        f"use NVIDIA's PyTorch container (Dockerfile), or {install_command('gpu')}",
    )


def check_apex(software: Software, *, has_gpu: bool) -> Diagnosis:
    """Check Apex, whose fused kernels Transformer Engine has as well."""
    if software.apex is not None:
        return passed("apex", software.apex)
    if not has_gpu or software.transformer_engine is not None:
        return passed("apex", "not installed, not needed here")
    found = "neither Apex nor Transformer Engine is installed"
    cost = "torch's Adam is used, and matrix products do not accumulate gradients in place"
    return Diagnosis("apex", Level.NOTE, found, cost, "use NVIDIA's PyTorch container, which has both")


def check_nccl(software: Software, *, has_gpu: bool) -> Diagnosis:
    """Check NCCL, over which GPUs communicate."""
    if software.nccl is not None:
        return passed("NCCL", software.nccl)
    if not has_gpu:
        return passed("NCCL", "none, not needed on a CPU, which uses gloo")
    return Diagnosis("NCCL", Level.BLOCKS, "torch has none", "GPUs cannot communicate", "install a CUDA build of torch")


def _tested_core(found: str, python: str) -> Diagnosis:
    tested = _TESTED_CORE.get(".".join(python.split(".")[:2]))
    if tested is None or found.startswith(tested):
        return passed("megatron-core", found)
    cost = f"our tests on Python {python} use megatron-core {tested}"
    return Diagnosis("megatron-core", Level.NOTE, found, cost, "run `make test` once on this machine")


def _fits(found: str, wanted: str) -> bool:
    if not wanted:
        return True
    try:
        version = Version(found)
    except InvalidVersion:
        return True  # a custom build, whose version cannot be compared
    return Requirement(f"x{wanted}").specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
