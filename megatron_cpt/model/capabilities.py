"""Table of hardware and library requirements, checked before data or checkpoints are loaded."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_cpt.config import RunConfig
from megatron_cpt.config.precision_checks import RECIPES, check_quantized_shapes
from megatron_cpt.errors import UserError
from megatron_cpt.model.gradient_products import adds_exactly

Version = tuple[int, int]
"""Major and minor version."""


@dataclass(frozen=True)
class Machine:
    """GPU and libraries of this machine.

    Attributes:
        device: name of the GPU, or None.
        capability: compute capability: 8.9 is Ada, 9.0 Hopper, 10.0 Blackwell.
        cuda: CUDA version of the torch build.
        transformer_engine: version; None: not installed, or it does not load.
        fault: error of an installed Transformer Engine that does not load.
        adds_gradients: a matrix product of Apex or torch adds weight gradients to an fp32 buffer.
    """

    device: str | None = None
    capability: Version = (0, 0)
    cuda: Version = (0, 0)
    transformer_engine: Version | None = None
    fault: str | None = None
    adds_gradients: bool = False

    def __str__(self) -> str:
        if self.device is None:
            return "no CUDA device"
        te = "no Transformer Engine"
        if self.transformer_engine is not None:
            te = f"Transformer Engine {_dotted(self.transformer_engine)}"
        elif self.fault is not None:
            te = f"a Transformer Engine that does not load ({self.fault})"
        return f"{self.device} (compute capability {_dotted(self.capability)}), CUDA {_dotted(self.cuda)}, {te}"


def read_machine() -> Machine:
    """Read the capabilities of the machine of this process."""
    if not torch.cuda.is_available():
        return Machine()
    version, fault = _transformer_engine()
    has_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return Machine(
        device=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        cuda=parse_version(torch.version.cuda or "0.0"),
        transformer_engine=version,
        fault=fault,
        adds_gradients=has_apex or adds_exactly(torch.cuda.current_device()),
    )


def _transformer_engine() -> tuple[Version | None, str | None]:
    if importlib.util.find_spec("transformer_engine") is None:
        return None, None
    try:
        import transformer_engine
        import transformer_engine.pytorch  # fails if its compiled part does not fit this torch
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0]
    return parse_version(transformer_engine.__version__), None


def parse_version(text: str) -> Version:
    """Return major and minor version: (2, 8) for `2.8.0.dev1+abc`."""
    major, minor = [*re.findall(r"\d+", text), "0", "0"][:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class Requirement:
    """Row of the table; `setting` returns the setting of a run that needs it, such as `parallel.context: 2`."""

    setting: Callable[[RunConfig], str | None]
    is_met: Callable[[Machine], bool]
    needs: str


_BACKEND = "precision.fp8.backend"


def _fp8(*recipes: str, backend: str = "transformer_engine") -> Callable[[RunConfig], str | None]:
    def setting(run: RunConfig) -> str | None:
        fp8 = run.precision.fp8
        if fp8 is None or fp8.backend != backend or fp8.recipe not in recipes:
            return None
        return f"precision.fp8.recipe: {fp8.recipe}" if backend == "transformer_engine" else f"{_BACKEND}: {backend}"

    return setting


def _fp4(run: RunConfig) -> str | None:
    return None if run.precision.fp4 is None else f"precision.fp4.recipe: {run.precision.fp4.recipe}"


def _context(run: RunConfig) -> str | None:
    return f"parallel.context: {run.parallel.context}" if run.parallel.context > 1 else None


def _te_from(*version: int) -> Callable[[Machine], bool]:
    return lambda machine: machine.transformer_engine is not None and machine.transformer_engine >= version


def _has_torch_fp8(machine: Machine) -> bool:
    return machine.device is None or machine.capability >= (8, 9)


_ANY = ("delayed", "tensorwise", "blockwise", "mxfp8")
_WITH_TE = "Transformer Engine on a GPU"
# Sources: for compute capabilities and CUDA, `_compute_*_support` in Transformer Engine's pytorch/quantization.py
# (2.20); for versions of Transformer Engine, megatron-core's fp8_utils.py and fp4_utils.py (0.16.1 and 0.19.2).
REQUIREMENTS = (
    Requirement(_context, _te_from(0, 0), _WITH_TE),
    Requirement(_fp8(*_ANY), _te_from(0, 0), _WITH_TE),
    Requirement(_fp4, _te_from(0, 0), _WITH_TE),
    Requirement(_fp8("delayed", "tensorwise"), lambda m: m.capability >= (8, 9), "an Ada, Hopper or newer GPU (8.9)"),
    Requirement(_fp8("tensorwise"), _te_from(2, 2), "Transformer Engine 2.2"),
    Requirement(_fp8("blockwise"), lambda m: m.capability >= (9, 0), "a Hopper or newer GPU (9.0)"),
    Requirement(_fp8("blockwise"), lambda m: m.cuda >= (12, 9), "CUDA 12.9"),
    Requirement(_fp8("blockwise"), _te_from(2, 3), "Transformer Engine 2.3"),
    Requirement(_fp8("mxfp8"), lambda m: (10, 0) <= m.capability < (12, 0), "a Blackwell data-center GPU (10.x)"),
    Requirement(_fp8("mxfp8"), _te_from(2, 1), "Transformer Engine 2.1"),
    Requirement(_fp4, lambda m: m.capability >= (10, 0), "a Blackwell GPU (10.0)"),
    Requirement(_fp4, _te_from(2, 7), "Transformer Engine 2.7"),
    # A CPU computes `torch._scaled_mm` too, without the speed. Rows of factors: "Rowwise scaling" in aten/native/cuda.
    Requirement(
        _fp8("delayed", "tensorwise", "rowwise", backend="torch"), _has_torch_fp8, "an Ada, Hopper or newer GPU (8.9)"
    ),
)


def with_fp8_backend(run: RunConfig, machine: Machine) -> RunConfig:
    """Return the run with `precision.fp8.backend` chosen for a machine, if the run leaves it open.

    A Transformer Engine that is installed but does not load is chosen too, so that `check_machine` reports its fault.
    """
    fp8 = run.precision.fp8
    if fp8 is None or fp8.backend is not None:
        return run
    has_other = machine.device is not None and _has_torch_fp8(machine) and fp8.recipe in RECIPES["torch"]
    is_te = machine.transformer_engine is not None or machine.fault is not None or fp8.params
    backend = "torch" if fp8.recipe == "rowwise" or (has_other and not is_te) else "transformer_engine"
    precision = run.precision.model_copy(update={"fp8": fp8.model_copy(update={"backend": backend})})
    return run.model_copy(update={"precision": precision})


def check_machine(run: RunConfig, machine: Machine) -> RunConfig:
    """Check a run against the table, and return it with the FP8 backend of this machine.

    Raises:
        UserError: with each unsupported setting, its requirements, and the capabilities of this machine; or with shapes
            that the FP8 backend of this machine refuses.
    """
    run = with_fp8_backend(run, machine)
    missing: dict[str, list[str]] = {}
    for requirement in REQUIREMENTS:
        setting = requirement.setting(run)
        if setting is not None and not requirement.is_met(machine):
            missing.setdefault(setting, []).append(requirement.needs)
    shapes = [*check_quantized_shapes(run)]  # config checked them only if the run names its backend
    if shapes:
        raise UserError("; ".join(shapes))
    if not missing:
        return run
    # without Transformer Engine its required version does not matter
    shown = {setting: needs[:1] if needs[0] == _WITH_TE else needs for setting, needs in missing.items()}
    problems = [f"{setting}: needs {' and '.join(needs)}" for setting, needs in shown.items()]
    raise UserError(
        f"{'; '.join(problems)}; this machine has {machine}; remove the setting (for a rehearsal: parallel.context=1, "
        "precision.fp4=null, precision.fp8=null or precision.fp8.backend=emulated; without Transformer Engine, "
        "precision.fp8.backend=torch has FP8 by PyTorch)"
    )


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
