"""Error of the planner's memory model against real runs, and a comparison with Megatron-LM's estimate.

    python benchmarks/memory_model.py [--only NAME ...]

1. Train small models for one step in gloo processes, over two dozen layouts, precisions and shapes. Each rank counts
   the bytes of parameters, gradient buffers and optimizer states by storage. For a forward and backward pass it follows
   every storage that torch's operations create (`tests/helpers/memory.py`). The estimate for the `local` layer spec
   should be within 10% for every part on every stage.
2. Estimate Nemotron-4 15B in three layouts (`te` layer spec) and compare with Megatron-LM's report, whose two formulas
   are repeated here from megatron/training/theoretical_memory_usage.py (commit 00caa53). megatron-core has no report.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_cpt.config import RunConfig, draft_config, load_config
from megatron_cpt.planning import Layout, count_parameters
from megatron_cpt.planning.cost.memory import GIB, Memory, stage_memories, stage_memory
from tests.helpers.memory import measure_several
from tests.helpers.ranks import run_ranks

RUN = {
    "name": "memory",
    "output": "runs/memory",
    "model": {"layers": 4, "hidden": 256, "ffn_hidden": 1024, "heads": 8, "kv_groups": 4, "vocab": 2048},
    "seq_length": 256,
    "batch": {"global": 16, "micro": 2},
    "tokens": 16 * 256,
    "schedule": {"max_lr": 1e-3},
    "sources": {"text": {"path": "data/text"}},
    "phases": [{"name": "only", "blend": {"text": 1}}],
}
LLAMA = (
    "model={layers: 4, hidden: 256, ffn_hidden: 688, heads: 8, vocab: 2048, activation: silu, gated: true, "
    "norm: rmsnorm}"
)
SEQUENCE = "parallel={tensor: 2, sequence: true}"
CASES: dict[int, dict[str, list[str]]] = {
    1: {
        "bf16": [],
        "fp32": ["precision.compute=fp32"],
        "micro-batch 1": ["batch.micro=1"],
        "micro-batch 4": ["batch.micro=4"],
        "gated, RMSNorm, no groups": [LLAMA],
        "gated, fp32": [LLAMA, "precision.compute=fp32"],
        "GELU and biases": ["model.activation=gelu", "model.linear_bias=true", "model.norm=layernorm"],
        "normalized queries and keys": ["model.qk_norm=true"],
        "tied embeddings": ["model.tied_embeddings=true"],
        "dropout": ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"],
        "attention within documents": ["documents={reset_attention: true, eod_id: 0}"],
        "selective recomputation": ["recompute.granularity=selective"],
        "full recomputation": ["recompute.granularity=full"],
        "full recomputation, 2 layers": ["recompute={granularity: full, num_layers: 2}"],
        "full recomputation of 2 of 4 layers": ["recompute={granularity: full, method: block, num_layers: 2}"],
    },
    2: {
        "TP2": ["parallel.tensor=2"],
        "TP2, sequence parallel": [SEQUENCE],
        "TP2, sequence parallel, gated": [LLAMA, SEQUENCE],
        "TP2, sequence parallel, full recomputation": [SEQUENCE, "recompute.granularity=full"],
        "PP2": ["parallel.pipeline=2"],
        "PP2, gated": [LLAMA, "parallel.pipeline=2"],
        "PP2, unequal stages": ["parallel={pipeline: 2, pipeline_layout: [3, 1]}"],
        "PP2 VPP2, unequal chunks": ["parallel={pipeline: 2, virtual_pipeline: 2, pipeline_layout: [2, 1, 1, 0]}"],
        "PP2 VPP2": ["parallel={pipeline: 2, virtual_pipeline: 2}"],
        "PP2, full recomputation": ["parallel.pipeline=2", "recompute.granularity=full"],
        "DP2, distributed optimizer": [],
        "DP2, plain optimizer": ["parallel.distributed_optimizer=false"],
    },
    4: {
        "PP4": ["parallel.pipeline=4"],
        "PP4, 2 micro-batches": ["parallel.pipeline=4", "batch.micro=8"],
        "TP4, sequence parallel": ["parallel={tensor: 4, sequence: true}"],
        "TP2 PP2, sequence parallel": ["parallel={tensor: 2, pipeline: 2, sequence: true}"],
        "TP2 DP2, sequence parallel": [SEQUENCE],
    },
}
NEMOTRON = Path(__file__).parents[1] / "examples" / "nemotron4_15b" / "run.yaml"
LAYOUTS = {
    "TP8 PP4": "parallel={tensor: 8, pipeline: 4, sequence: true}",
    "TP4 PP2": "parallel={tensor: 4, pipeline: 2, sequence: true}",
    "TP2 PP1": "parallel={tensor: 2, pipeline: 1, sequence: true}",
}
NUM_GPUS = 64


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="run only these cases, and write no result")
    options = parser.parse_args()
    rows = [row for num_ranks in CASES for row in measured_rows(num_ranks, options.only)]
    print_rows(rows)
    table = theoretical_rows()
    print_table(table)
    if options.only:
        return
    from record import machine, write_result  # importable only when this file runs as a script

    write_result(
        "memory_model",
        {
            "machine": machine(),
            "what": "4 layers, hidden 256, 2,048 ids, sequences of 256; bytes per stage, predicted and measured",
            "target": "within 10% for every part",
            "worst_error": {part: max(abs(row["error"][part]) for row in rows) for part in rows[0]["error"]},
            "runs": rows,
            "nemotron4_15b": {"num_gpus": NUM_GPUS, "layouts": table},
        },
    )


def measured_rows(num_ranks: int, only: list[str] | None) -> list[dict[str, Any]]:
    """Return prediction and measurement of every case for a number of ranks, one row per pipeline stage."""
    cases = {name: changes for name, changes in CASES[num_ranks].items() if not only or name in only}
    if not cases:
        return []
    by_rank = run_ranks(num_ranks, measure_several, RUN, list(cases.values()), timeout=1200)
    rows = []
    for index, (name, changes) in enumerate(cases.items()):
        config = draft_config(dict(RUN), changes).config
        assert config is not None
        layout = Layout.build(config, num_ranks)
        by_stage = {rank[index]["stage"]: rank[index] for rank in by_rank}
        rows += [row_of(name, config, layout, stage, measured) for stage, measured in sorted(by_stage.items())]
    return rows


def row_of(name: str, config: RunConfig, layout: Layout, stage: int, measured: dict[str, float]) -> dict[str, Any]:
    """Return prediction, measurement and error of one stage."""
    predicted = parts_of(stage_memory(config, layout, stage, spec="local"))
    measured = {part: measured[part] for part in predicted if part != "total"}
    measured["total"] = sum(measured.values())
    return {
        "run": name,
        "ranks": layout.num_gpus,
        "stage": stage,
        "predicted": predicted,
        "measured": measured,
        "error": {part: predicted[part] / measured[part] - 1 for part in predicted},
    }


def parts_of(memory: Memory) -> dict[str, float]:
    """Return the parts that can be measured; the tensors of a pass are measured together."""
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "pass": memory.activations + memory.logits + memory.working,
        "total": memory.total,
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(f"{'run':46} stage   weights gradients optimizer  activations     total   (error of the model)")
    for row in rows:
        errors = "  ".join(f"{value:+9.1%}" for value in row["error"].values())
        print(f"{row['run']:46} {row['stage']:5} {errors}   {row['measured']['total'] / 2**20:7.1f} MiB measured")


def theoretical_rows() -> list[dict[str, Any]]:
    """Return our estimate of the first and the largest stage of Nemotron-4 15B and Megatron-LM's report, in GiB."""
    rows = []
    for name, parallel in LAYOUTS.items():
        config = load_config(NEMOTRON, [parallel])
        layout = Layout.build(config, NUM_GPUS)
        stages = stage_memories(config, layout)
        largest = max(stages, key=lambda memory: memory.total)
        rows.append(
            {
                "layout": name,
                "data_parallel": layout.data_parallel,
                "ours_first_stage": stages[0].to_dict() | {"total": stages[0].total / GIB},
                "ours_worst_stage": largest.to_dict() | {"total": largest.total / GIB},
                "megatron_lm": megatron_lm_report(config, layout),
            }
        )
    return rows


def megatron_lm_report(config: RunConfig, layout: Layout) -> dict[str, float]:
    """Return the theoretical report of `--log-memory-to-tensorboard` in GiB, which covers the first stage only.

    States: 6 + 12 / (data-parallel size) bytes per parameter of the first stage (with the distributed optimizer).
    Activations, with sequence parallelism and selective recomputation: s b h (18 + 4 f / h) per layer, for all layers
    of the model, since p micro-batches are in flight on 1/p of the layers; 8 s b p for token ids and s b h p for
    dropout after the embedding; without a pipeline 4 s b h (1 + v / h) for head and loss; all divided by t.
    """
    model, parallel, parts = config.model, config.parallel, count_parameters(config.model)
    tensor, pipeline = parallel.tensor, parallel.pipeline
    layers = model.layers * (parts.layer.matmul + parts.layer.norms) + parts.final_norm
    table = model.padded_vocab * model.hidden
    tables = table if pipeline > 1 or model.tied_embeddings else 2 * table
    states = (layers / pipeline + tables) / tensor * (6 + 12 / layout.data_parallel)
    tokens = config.seq_length * config.batch.micro
    activations = tokens * model.hidden * (18 + 4 * model.ffn_hidden / model.hidden) * model.layers
    activations += (8 + model.hidden) * tokens * pipeline
    if pipeline == 1:
        activations += 4 * tokens * model.hidden * (1 + model.padded_vocab / model.hidden)
    elif parallel.virtual_pipeline == 1:
        activations *= min(1.0, layout.num_micro_batches / pipeline)
    else:
        activations *= 1 + (pipeline - 1) / (pipeline * parallel.virtual_pipeline)
    return {
        "weights_and_optimizer": states / GIB,
        "activations": activations / tensor / GIB,
        "total": (states + activations / tensor) / GIB,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\nNemotron-4 15B on {NUM_GPUS} GPUs, micro-batch 2, GiB per GPU")
    print(
        f"{'layout':8} {'ours: states':>13} {'activations':>12} {'loss':>6} {'total':>6} {'(largest stage)':>16}",
        end="",
    )
    print(f" {'Megatron-LM: states':>20} {'activations':>12} {'total':>6}")
    for row in rows:
        ours, largest, reference = row["ours_first_stage"], row["ours_worst_stage"], row["megatron_lm"]
        states = ours["weights"] + ours["gradients"] + ours["optimizer"]
        print(
            f"{row['layout']:8} {states:13.1f} {ours['activations'] + ours['working']:12.1f} {ours['logits']:6.1f} "
            f"{ours['total']:6.1f} {largest['total']:10.1f} (of {largest['stage']}) "
            f"{reference['weights_and_optimizer']:20.1f} {reference['activations']:12.1f} {reference['total']:6.1f}"
        )


if __name__ == "__main__":
    main()
