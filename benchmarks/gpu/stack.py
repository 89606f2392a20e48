"""Layers of Nemotron-4 15B as one of two tensor-parallel ranks holds them: ours, bare megatron-core, local layers.

python -m benchmarks.gpu.stack --which=ours --precision=tensorwise
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from benchmarks.gpu.measured import Report, run_item

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"compute": "bf16"},
    "tensorwise": {"compute": "bf16", "fp8": {"recipe": "tensorwise"}},
    "delayed": {"compute": "bf16", "fp8": {"recipe": "delayed"}},
}


def measure(report: Report) -> None:
    """Time one loop in one precision."""
    from benchmarks.gpu.busy import PROFILED_STEPS
    from benchmarks.gpu.loops import time_function, time_trainer
    from benchmarks.gpu.workload import WARM_UP, config_of, draw_weights_on_device, random_batches, stack_run
    from megatron_cpt.backend import process_groups

    which, precision = report.arguments.which, PRECISIONS[report.arguments.precision]
    steps = 3 if report.is_rehearsal else 20
    missing = _missing(report.arguments.precision)
    if missing and report.is_rehearsal and which != "bare":
        precision = {**precision, "fp8": {**precision["fp8"], "backend": "emulated"}}
    elif missing:
        report.note(unavailable=missing)
        return
    if which == "local":
        use_local_layers()
    draw_weights_on_device()
    run = config_of(stack_run(report, precision, steps=WARM_UP + steps + PROFILED_STEPS))
    if which != "bare":
        time_trainer(report, run, steps=steps)
        return
    from benchmarks.gpu.bare_loop import bare_steps, describe_layers

    with process_groups(run.parallel):
        report.note(layers=describe_layers())
        time_function(report, run, bare_steps(run, random_batches(run)), steps=steps)


def _missing(precision: str) -> str:
    """Return why this machine does not support a precision; empty if it does."""
    from megatron_cpt.model.capabilities import read_machine

    machine = read_machine()
    return "" if precision == "bf16" or machine.transformer_engine is not None else f"FP8: {machine}"


def use_local_layers() -> None:
    """Build the layers of megatron-core and torch although Transformer Engine is installed."""
    from megatron_cpt.model import build_model

    machine = dataclasses.replace(build_model.read_machine(), transformer_engine=None)
    build_model.read_machine = lambda: machine


IMPORTS = ("benchmarks.gpu.trainer_imports", "benchmarks.gpu.loops", "benchmarks.gpu.bare_loop")

if __name__ == "__main__":
    sys.exit(
        run_item(
            measure,
            imports=IMPORTS,
            options=[("--which", ("ours", "bare", "local")), ("--precision", tuple(PRECISIONS))],
        )
    )
