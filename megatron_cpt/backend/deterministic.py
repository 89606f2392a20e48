"""Settings of the process under which every kernel gives the same result in every execution (`deterministic: true`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from megatron_cpt.errors import UserError

# Accepted values, the first of which is set if the variable is not:
# - cuBLAS: "Results reproducibility" in NVIDIA's cuBLAS documentation; torch refuses to multiply without it.
# - NCCL: Megatron-LM's own list for `--deterministic-mode` (training/arguments.py).
# - Transformer Engine: megatron-core's TEDotProductAttention refuses deterministic_mode with another value.
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
_OF_ATTENTION = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@contextlib.contextmanager
def kernel_settings(*, deterministic: bool) -> Iterator[None]:
    """Set torch and the environment for `deterministic: true`, and restore both on exit.

    Variables by which megatron-core tells Transformer Engine its attention kernel are restored too, so that the next
    run of this process may choose another one.

    Raises:
        UserError: a variable has a value that is not deterministic, or is needed before CUDA, which has started.
    """
    before = {name: os.environ.get(name) for name in (*VARIABLES, *_OF_ATTENTION)}
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its type has no attributes
    filled = memory.fill_uninitialized_memory
    try:
        if deterministic:
            _set_variables()
            torch.use_deterministic_algorithms(True)
            # No kernel reads memory before it is written; filling it would cost one more write to every new tensor.
            memory.fill_uninitialized_memory = False
        yield
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(was_on, warn_only=warned)
            memory.fill_uninitialized_memory = filled
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _set_variables() -> None:
    for name, accepted in VARIABLES.items():
        value = os.environ.get(name)
        if value is not None and value not in accepted:
            raise UserError(
                f"deterministic: {name}={value} allows kernels that are not deterministic; unset it, or set it to "
                f"{' or '.join(accepted)}"
            )
        has_started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if value is None and name == "CUBLAS_WORKSPACE_CONFIG" and has_started:
            raise UserError(
                f"deterministic: {name} must be set before CUDA starts, but this process uses CUDA already; set it to "
                f"{accepted[0]} in the environment"
            )
        os.environ.setdefault(name, accepted[0])
