"""Error of the planner's speed model against published training runs (benchmarks/published_speeds.yaml).

    python benchmarks/adviser_accuracy.py [--markdown]

Three figures set constants of the model (`fit` in the file); errors on them and on all other figures are reported
separately. It takes a second and needs no GPU.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.config import RunConfig, draft_config
from megatron_cpt.planning import Layout, flops_per_token
from megatron_cpt.planning.cluster.step_time import Overlap, Speed, estimate_speed
from megatron_cpt.planning.hardware import H100

PUBLISHED = Path(__file__).parent / "published_speeds.yaml"
PARTS = ("matmul", "attention", "memory_bound", "communication", "uneven", "bubble", "exchange", "optimizer", "scale")


def main() -> None:
    """Compare, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/internals/adviser.md")
    options = parser.parse_args()
    rows = compare()
    (print_markdown if options.markdown else print_rows)(rows)
    summary = summarize(rows)
    print(summary)
    from record import write_result  # importable only when this file runs as a script

    write_result("adviser_accuracy", {"gpu": H100.title, "summary": summary, "runs": rows})


def compare() -> list[dict[str, Any]]:
    """Return one row per published run, with prediction and error."""
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    models = published.pop("models")
    return [row_of(source, run, models[run["model"]]) for source, runs in published.items() for run in runs]


def row_of(source: str, run: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return prediction and error of one published run."""
    config = config_of(run, model)
    # NVIDIA's recipes reduce gradients in bf16.
    speed = estimate_speed(config, Layout.build(config, run["gpus"]), H100, Overlap(gradient_bytes=2))
    tokens = run.get("tokens_per_gpu") or run["tokens_per_second"] / run["gpus"]
    flops = flops_per_token(config.model, config.seq_length)
    return {
        "source": source,
        "model": run["model"],
        "precision": run["precision"],
        "gpus": run["gpus"],
        "layout": layout_name(config),
        "published": tokens,
        "predicted": speed.tokens_per_gpu,
        "error": speed.tokens_per_gpu / tokens - 1,
        "published_tflops_causal": tokens * flops.causal / 1e12,
        "is_fitted": run.get("fit", False),
        "share_of_step": shares(speed),
    }


def config_of(run: dict[str, Any], model: dict[str, Any]) -> RunConfig:
    """Return the configuration of a published run."""
    tensor, length = run["tensor"], run.get("seq_length", 4096)
    data = {
        "name": run["model"],
        "output": "runs/none",
        "model": model,
        "seq_length": length,
        "batch": {"global": run["batch"], "micro": run["micro"]},
        "tokens": run["batch"] * length,
        "schedule": {"max_lr": 1e-4},
        "sources": {"text": {"path": "data/text"}},
        "phases": [{"name": "only", "blend": {"text": 1}}],
        "parallel": {
            "tensor": tensor,
            "pipeline": run.get("pipeline", 1),
            "virtual_pipeline": run.get("virtual", 1),
            "context": run.get("context", 1),
            "sequence": tensor > 1,
        },
        "precision": {"compute": "bf16", "fp8": {} if run["precision"] == "fp8" else None},
    }
    return draft_config(data).finish(str(PUBLISHED))


def layout_name(config: RunConfig) -> str:
    """Return a short name of the layout, such as `TP2 PP4 MBS1`."""
    parallel = config.parallel
    parts = [("TP", parallel.tensor), ("PP", parallel.pipeline), ("VP", parallel.virtual_pipeline)]
    named = " ".join(f"{name}{size}" for name, size in [*parts, ("CP", parallel.context)] if size > 1 or name == "TP")
    return f"{named} MBS{config.batch.micro}"


def shares(speed: Speed) -> dict[str, float]:
    """Return the predicted share of each part of a step."""
    return {part: round(getattr(speed, part) / speed.step, 4) for part in PARTS}


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return errors on fitted figures, on held-out figures, and on models without any fitted figure."""
    held_out = [abs(row["error"]) for row in rows if not row["is_fitted"]]
    fitted_models = {row["model"] for row in rows if row["is_fitted"]}
    others = [abs(row["error"]) for row in rows if row["model"] not in fitted_models]
    return {
        "fitted": sum(row["is_fitted"] for row in rows),
        "fitted_worst": max(abs(row["error"]) for row in rows if row["is_fitted"]),
        "held_out": len(held_out),
        "held_out_mean": statistics.mean(held_out),
        "held_out_median": statistics.median(held_out),
        "held_out_worst": max(held_out),
        "other_models": len(others),
        "other_models_mean": statistics.mean(others),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        parts = "  ".join(f"{part[:6]} {share:.1%}" for part, share in row["share_of_step"].items())
        print(
            f"{row['model']:22}{row['precision']:5}{row['gpus']:5} {row['layout']:20} "
            f"{row['published']:8,.0f} {row['predicted']:8,.0f} {row['error']:+7.1%} "
            f"{'fit' if row['is_fitted'] else '   '} {parts}"
        )


def print_markdown(rows: list[dict[str, Any]]) -> None:
    print("\n".join(markdown(rows)))


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table in docs/internals/adviser.md."""
    lines = ["| model | precision | H100s | layout | published | model | error | source |"]
    lines.append("| --- | --- | ---: | --- | ---: | ---: | ---: | --- |")
    for row in rows:
        error = f"{row['error']:+.1%}" + (" (fitted)" if row["is_fitted"] else "")
        lines.append(
            f"| {row['model']} | {row['precision']} | {row['gpus']:,} | {row['layout']} | {row['published']:,.0f} "
            f"| {row['predicted']:,.0f} | {error} | {row['source']} |"
        )
    return lines


if __name__ == "__main__":
    main()
