"""Peak memory of Nemotron-4 15B on a fake CUDA device, beside the planner's figure.

    python benchmarks/fake_gpu_memory.py [--only LAYOUT ...]

First and last stage of six layouts on 64 GPUs. Each rank trains two steps at full size through the code of a GPU (local
layers, all knobs that are on by default) with as many micro-batches as its pipeline holds at a time. The storages that
live on the device are counted, `tests/helpers/fake_cuda/memory.py`. The planner's figure should be within 5 %.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import machine, write_result
from megatron_cpt.config import draft_config
from megatron_cpt.planning import Layout
from megatron_cpt.planning.cost.memory import GIB, stage_memory
from tests.helpers.fake_cuda import RUN, train_on_fake_gpu

NUM_GPUS = 64
LAYOUTS: dict[str, list[str]] = {
    "TP8 PP4": [],
    "TP8 PP4 VPP2": ["parallel.virtual_pipeline=2"],
    "TP4 PP8": ["parallel.tensor=4", "parallel.pipeline=8"],
    "TP2 PP8": ["parallel.tensor=2", "parallel.pipeline=8"],
    "TP4 PP4 MBS2, selective recomputation": [
        "parallel.tensor=4",
        "batch.micro=2",
        "recompute.granularity=selective",
    ],
    "TP8 PP1, full recomputation": ["parallel.pipeline=1", "recompute.granularity=full"],
}


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="run only these layouts, and write no result")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="layouts at a time")
    options = parser.parse_args()
    names = options.only or list(LAYOUTS)
    with ThreadPoolExecutor(options.jobs) as pool:  # one process per layout
        reports = list(pool.map(lambda name: train_on_fake_gpu(cases_of(LAYOUTS[name])), names))
    rows = [row_of(name, report) for name, ranks in zip(names, reports, strict=True) for report in ranks]
    print_rows(rows)
    if options.only:
        return
    write_result(
        "fake_gpu_memory",
        {
            "machine": machine(),
            "what": f"Nemotron-4 15B on {NUM_GPUS} GPUs, local layers; GiB per GPU, counted on a fake CUDA device",
            "target": "within 5%",
            "worst_error": max(abs(row["error"]) for row in rows),
            "rows": rows,
        },
    )


def cases_of(overrides: list[str]) -> list[dict[str, Any]]:
    """Return the first and the last rank of a layout, with enough micro-batches to fill the pipeline."""
    config = config_of(overrides)
    stages = config.parallel.pipeline
    ranks = sorted({0, NUM_GPUS - 1}) if stages > 1 else [0]
    return [
        {"rank": rank, "world_size": NUM_GPUS, "overrides": overrides, "micro_batches": max(2, stages)}
        for rank in ranks
    ]


def config_of(overrides: list[str]) -> Any:
    """Return the run of a layout."""
    config = draft_config(dict(RUN), overrides).config
    assert config is not None
    return config


def row_of(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """Return the counted peak of one rank and the planner's figures."""
    case, stage, peak = report["case"], report["stage"], report["memory"]["peak"]
    config, num_gpus = config_of(case["overrides"]), case["world_size"]
    replicas = num_gpus // config.parallel.model_parallel_size
    config = config_of([*case["overrides"], f"batch.global={case['micro_batches'] * replicas * config.batch.micro}"])
    layout = Layout.build(config, num_gpus)
    planned = {spec: stage_memory(config, layout, stage, spec=spec) for spec in ("local", "te")}
    return {
        "layout": name,
        "stage": stage,
        "counted_gib": peak / GIB,
        "between_steps_gib": report["memory"]["before"] / GIB,
        "planned_gib": planned["local"].total / GIB,
        "planned_parts": planned["local"].to_dict(),
        "planned_transformer_engine_gib": planned["te"].total / GIB,
        "error": planned["local"].total / peak - 1,
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the table of docs/internals/gpu-path.md."""
    print("| layout | stage | counted | planner | error | planner with TE layers |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['layout']} | {row['stage']} | {row['counted_gib']:.2f} | {row['planned_gib']:.2f} | "
            f"{row['error']:+.1%} | {row['planned_transformer_engine_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
