"""Layers of Nemotron-4 15B as one of two tensor-parallel ranks holds them: ours, bare megatron-core, local layers.

python -m benchmarks.gpu.stack --which=ours --precision=tensorwise
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from benchmarks.gpu.measured import Report, run_item
from megatron_cpt.config import RunConfig
from megatron_cpt.errors import UserError

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"compute": "bf16"},
    "tensorwise": {"compute": "bf16", "fp8": {"recipe": "tensorwise"}},
    "delayed": {"compute": "bf16", "fp8": {"recipe": "delayed"}},
}


def measure(report: Report) -> None:
    """Time one loop in one precision."""
    from benchmarks.gpu.busy import PROFILED_STEPS
    from benchmarks.gpu.loops import time_trainer
    from benchmarks.gpu.workload import WARM_UP, config_of, draw_weights_on_device, stack_run

    which, steps = report.arguments.which, 3 if report.is_rehearsal else 20
    precision = PRECISIONS[report.arguments.precision]
    if "fp8" in precision and which != "bare" and (report.is_rehearsal or which == "local"):
        backend = "emulated" if report.is_rehearsal else "torch"
        precision = {**precision, "fp8": {**precision["fp8"], "backend": backend}}
    if which == "local":
        use_local_layers()
    draw_weights_on_device()
    try:
        run = config_of(stack_run(report, precision, steps=WARM_UP + steps + PROFILED_STEPS))
        if which == "bare":
            _time_bare(report, run, steps=steps)
        else:
            time_trainer(report, run, steps=steps)
    except UserError as error:
        report.note(unavailable=str(error))


def _time_bare(report: Report, run: RunConfig, *, steps: int) -> None:
    from benchmarks.gpu.bare_loop import bare_steps, describe_layers
    from benchmarks.gpu.loops import time_function
    from benchmarks.gpu.workload import random_batches
    from megatron_cpt.backend import process_groups
    from megatron_cpt.model.capabilities import read_machine

    machine = read_machine()
    if run.precision.fp8 is not None and machine.transformer_engine is None:
        report.note(unavailable=f"megatron-core has FP8 with Transformer Engine only; this machine has {machine}")
        return
    with process_groups(run.parallel):
        report.note(layers=describe_layers())
        time_function(report, run, bare_steps(run, random_batches(run)), steps=steps)


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
