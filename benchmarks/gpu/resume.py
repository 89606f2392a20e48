"""Deterministic resume: ten steps in one process, and the same ten in two, must agree digit for digit.

python -m benchmarks.gpu.resume
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu.measured import Report, run_item

MODEL = {
    "layers": 4,
    "hidden": 1024,
    "ffn_hidden": 4096,
    "heads": 8,
    "kv_groups": 2,
    "vocab": 8192,
    "rotary_percent": 0.5,
}
STEPS = 10
COMPARED = ("step", "loss", "grad_norm")


def measure(report: Report) -> None:
    """Train without and with an interruption, side by side, and compare."""
    from benchmarks.gpu.children import Training
    from benchmarks.gpu.workload import run_mapping
    from megatron_cpt.config import RunConfig

    is_offered = "deterministic" in RunConfig.model_fields
    report.note(deterministic=is_offered)

    def run(name: str, **changes: Any) -> dict[str, Any]:
        return run_mapping(
            report,
            MODEL,
            micro=2,
            num_micro_batches=2,
            steps=STEPS,
            precision={"compute": "bf16"},
            output=str(report.memory / name),
            checkpoint={},
            schedule={"max_lr": 1e-4},
            log={"every": 1},
            **({"deterministic": True} if is_offered else {}),
            **changes,
        )

    whole = Training(report, "whole", run("whole"))
    first = Training(report, "first", run("halves", stop_at_step=STEPS // 2))
    halves = first.lines()
    halves += Training(report, "second", run("halves")).lines()
    expected = whole.lines()
    rows = [[tuple(line[key] for key in COMPARED) for line in lines] for lines in (expected, halves)]
    report.note(
        steps=len(rows[0]),
        different_steps=sum(one != other for one, other in zip(*rows, strict=True)),
        last_losses=[expected[-1]["loss"], halves[-1]["loss"]],
    )


IMPORTS = ("benchmarks.gpu.workload",)

if __name__ == "__main__":
    sys.exit(run_item(measure, imports=IMPORTS))
