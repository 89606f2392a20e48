"""Runs of a known law: real plans, and the losses that the law gives for them, with noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

from megatron_cpt.config import RunConfig, draft_config
from megatron_cpt.law.finished_runs import FinishedRun
from megatron_cpt.law.run_path import RunPath, path_of_plan
from megatron_cpt.law.terms import LawShape, terms
from megatron_cpt.planning import build_plan

SOURCES = ("web", "code", "qa")
TOKENS_PER_STEP = 512
STEPS = 40
TRUNK_LOSSES = {"general": 3.0, "exam": 5.0}
MAX_RATE = 1e-3
AREA = MAX_RATE * STEPS * TOKENS_PER_STEP
"""Forward area of the longest small run: `STEPS` at a constant rate."""

# qa teaches `exam` much and `general` little; `general` forgets a little while qa is read.
_COEFFICIENTS = {
    "general": (0.06, -0.01, -0.01, 0.04, -0.02, -0.01, -0.01),
    "exam": (0.06, 0.02, 0.01, -0.12, -0.02, -0.01, -0.25),
}
_SHAPE = LawShape(AREA, MAX_RATE, annealing=16.0, shift=8.0, learning=1.0, exponent=1.0)


def general_blend() -> dict[str, float]:
    """Return the blend without qa."""
    return {"web": 0.7, "code": 0.3}


def qa_blend(share: float) -> dict[str, float]:
    """Return the general blend with a share of qa."""
    return {name: weight * (1 - share) for name, weight in general_blend().items()} | {"qa": share}


def law_config(
    *blends: Mapping[str, float], steps: int = STEPS, until: Mapping[str, Any] | None = None, **schedule: Any
) -> dict[str, Any]:
    """Return the plain data of a run.yaml with one phase, or with two and a switch."""
    phases: list[dict[str, Any]] = [{"name": f"part{n}", "blend": dict(blend)} for n, blend in enumerate(blends, 1)]
    if until is not None:
        phases[0]["until"] = dict(until)
    used = {name for blend in blends for name in blend}
    return {
        "name": "law",
        "output": "runs/law",
        "model": {"preset": "tiny_nemotron"},
        "init": {"from": "runs/trunk"},
        "seq_length": 64,
        "batch": {"global": 8, "micro": 2},
        "tokens": steps * TOKENS_PER_STEP,
        "schedule": {"shape": "cosine", "max_lr": MAX_RATE, "min_lr": MAX_RATE / 100, **schedule},
        "sources": {name: {"path": f"data/{name}", "tokens": "1M"} for name in SOURCES if name in used},
        "phases": phases,
        "validation": {"every": 4, "sources": {name: f"data/{name}_val" for name in TRUNK_LOSSES}},
    }


def small_configs() -> list[dict[str, Any]]:
    """Return ten small runs that differ in blend, switch and schedule."""
    return [
        law_config(general_blend()),
        law_config(qa_blend(0.1)),
        law_config(qa_blend(0.3)),
        law_config(general_blend(), qa_blend(0.2), until={"lr": 0.2}),
        law_config(general_blend(), qa_blend(0.2), until={"lr": 0.5}),
        law_config(qa_blend(0.1), shape="linear", min_lr=MAX_RATE / 10),
        law_config(qa_blend(0.2), shape="constant"),
        law_config(general_blend(), shape="constant"),
        law_config({"web": 0.4, "code": 0.5, "qa": 0.1}),
        law_config(qa_blend(0.15), steps=STEPS // 2),
    ]


def arm_configs(steps: int) -> list[dict[str, Any]]:
    """Return runs of other blends, switches and schedules than the small ones."""
    return [
        law_config(general_blend(), steps=steps),
        law_config(qa_blend(0.2), steps=steps),
        law_config(general_blend(), qa_blend(0.25), until={"lr": 0.35}, steps=steps),
        law_config(qa_blend(0.15), shape="wsd", steps=steps),
        law_config(general_blend(), qa_blend(0.3), until={"lr": 0.15}, shape="linear", steps=steps),
    ]


def parse(data: dict[str, Any]) -> RunConfig:
    """Return the configuration of plain data."""
    return draft_config(data).finish("run.yaml")


def true_losses(path: RunPath, held_out: str) -> np.ndarray:
    """Return the losses of the known law at all knots."""
    change = terms(path.with_sources(SOURCES), _SHAPE) @ np.array(_COEFFICIENTS[held_out])
    return TRUNK_LOSSES[held_out] * np.exp(change)


def law_run(data: dict[str, Any], rng: np.random.Generator, *, noise: float, name: str = "run") -> FinishedRun:
    """Return a finished run with ten validations; each run has an error of its own, and each validation a smaller one.

    Args:
        noise: standard deviation of the error of a run at its end, in nats.
    """
    config = parse(data)
    plan = build_plan(config, {}).to_dict()
    steps = np.unique(np.linspace(0, plan["steps"], 11).round().astype(np.int64))[1:]
    path = path_of_plan(plan, at=steps.tolist())
    knots = path.knots_at(steps.tolist())
    reach = np.sqrt(np.minimum(1.0, path.areas[knots] / AREA))
    losses = {
        held_out: true_losses(path, held_out)[knots]
        + noise * rng.standard_normal() * reach
        + 0.3 * noise * rng.standard_normal(len(steps))
        for held_out in TRUNK_LOSSES
    }
    return FinishedRun(name, config.to_dict(), path, path_of_plan(plan), dict(TRUNK_LOSSES), steps, losses, ())


def write_law_run(folder: Path, data: dict[str, Any], *, noise: float = 0.002, seed: int = 0) -> Path:
    """Write run.yaml, plan.json and metrics.jsonl of a finished run, and return its folder."""
    run = law_run(data, np.random.default_rng(seed), noise=noise)
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(run.config, sort_keys=False))
    (folder / "plan.json").write_bytes(orjson.dumps(build_plan(parse(data), {}).to_dict()))
    lines = [{"step": 0, "validation": dict(run.start)}]
    lines += [
        {"step": int(step), "validation": {name: float(values[index]) for name, values in run.losses.items()}}
        for index, step in enumerate(run.steps)
    ]
    (folder / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return folder
