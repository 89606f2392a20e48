"""Losses of 20 steps on the CPU and on the GPU, with local layers and Transformer Engine's, in fp32 and bf16.

    python -m benchmarks.gpu.losses

The trainings run side by side. Each comparison is the largest relative difference of any step's loss.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu.measured import Report, run_item

MODEL = {"preset": "tiny_nemotron", "vocab": 512}
STEPS = 20


def measure(report: Report) -> None:
    """Train every variant and compare."""
    from benchmarks.gpu.children import Training
    from benchmarks.gpu.workload import run_mapping
    from megatron_cpt.model.capabilities import read_machine

    def run(name: str, compute: str) -> dict[str, Any]:
        return run_mapping(
            report,
            MODEL,
            micro=2,
            num_micro_batches=4,
            steps=STEPS,
            precision={"compute": compute},
            output=str(report.work / name),
            schedule={"max_lr": 1e-3},
            log={"every": 1},
        )

    machine = read_machine()
    has_te = machine.transformer_engine is not None
    trainings = [
        Training(report, "cpu", run("cpu", "fp32"), on_cpu=True),
        Training(report, "gpu", run("gpu", "fp32"), local=True),
        Training(report, "gpu_bf16", run("gpu_bf16", "bf16"), local=True),
    ]
    if has_te:
        trainings.append(Training(report, "te", run("te", "fp32")))
        trainings.append(Training(report, "te_bf16", run("te_bf16", "bf16")))
    else:
        report.note(transformer_engine=f"not measured: {machine}")
    losses = {training.name: [line["loss"] for line in training.lines()] for training in trainings}
    report.note(losses=losses)
    report.note(
        gpu_over_cpu=difference(losses["gpu"], losses["cpu"]),
        bf16_over_fp32=difference(losses["gpu_bf16"], losses["gpu"]),
    )
    if has_te:
        report.note(
            te_over_local=difference(losses["te"], losses["gpu"]),
            te_over_local_bf16=difference(losses["te_bf16"], losses["gpu_bf16"]),
        )


def difference(losses: list[float], reference: list[float]) -> float:
    """Return the largest relative difference of two series."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


IMPORTS = ("benchmarks.gpu.workload", "megatron_cpt.model.capabilities")

if __name__ == "__main__":
    sys.exit(run_item(measure, imports=IMPORTS))
