"""Rivals of item 4: the 1.1B with the same batch in a bare megatron-core loop, and in plain PyTorch.

python -m benchmarks.gpu.rivals --which=plain
"""

from __future__ import annotations

import sys

from benchmarks.gpu.measured import Report, run_item


def measure(report: Report) -> None:
    """Time one rival."""
    from benchmarks.gpu.loops import time_function
    from benchmarks.gpu.workload import config_of, one_billion_run, random_batches

    steps = 3 if report.is_rehearsal else 20
    run = config_of(one_billion_run(report, steps=steps))
    batches = random_batches(run)
    if report.arguments.which == "plain":
        from benchmarks.gpu.plain_gpt import plain_steps

        report.note(layers="plain PyTorch with torch.compile, autocast to bf16 over fp32 weights")
        time_function(report, run, plain_steps(run, batches), steps=steps)
        return
    from benchmarks.gpu.bare_loop import bare_steps, describe_layers
    from megatron_cpt.backend import process_groups

    with process_groups(run.parallel):
        report.note(layers=describe_layers())
        time_function(report, run, bare_steps(run, batches), steps=steps)


IMPORTS = (
    "benchmarks.gpu.trainer_imports",
    "benchmarks.gpu.loops",
    "benchmarks.gpu.bare_loop",
    "benchmarks.gpu.plain_gpt",
)

if __name__ == "__main__":
    sys.exit(run_item(measure, imports=IMPORTS, options=[("--which", ("bare", "plain"))]))
