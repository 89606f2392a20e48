"""Environment variables that CUDA and torch read when they start; this module imports neither."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """Row of the table; `set_by` is the program that sets the variable unless it is set already."""

    name: str
    value: str
    gain: str
    set_by: str = "`train`, `launch`"


CUDA_VARIABLES = (
    # One hardware queue: kernels start in the order they were issued, so a collective of tensor parallelism starts
    # before the matrix product that should hide it (Megatron-Core developer guide).
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "starts communication before the matrix product that hides it; set 32 with context parallelism alone",
    ),
    # docs.pytorch.org, notes on CUDA memory: segments grow instead of being replaced by larger ones.
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "reduces fragmentation of memory by the micro-batches of a pipeline",
    ),
)
"""Variables for any machine with GPUs; they have no effect on a CPU."""

CLUSTER_VARIABLES = tuple(
    Variable(name, value, gain, set_by="`examples/nemotron4_15b/cluster.sh`")
    for name, value, gain in (
        ("NCCL_IB_TIMEOUT", "22", "waits through short failures of a network link instead of ending the run"),
        ("NCCL_IB_RETRY_CNT", "7", "retries through short failures of a network link instead of ending the run"),
    )
)
"""Variables for a cluster's network."""


def set_cuda_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of `CUDA_VARIABLES` that are not set; call this before torch is imported."""
    for variable in CUDA_VARIABLES:
        environment.setdefault(variable.name, variable.value)


def variables_table() -> str:
    """Return the table of variables for docs/operations/speed.md."""
    from megatron_cpt.config.knobs import markdown_table

    rows = [(f"`{v.name}`", f"`{v.value}`", v.set_by, v.gain) for v in (*CUDA_VARIABLES, *CLUSTER_VARIABLES)]
    return markdown_table([("variable", "value", "set by", "gain"), *rows])
