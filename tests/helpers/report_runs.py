"""Run directories for reports: files as `train` and `evaluate` write them, with numbers that are easy to check."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import yaml

STEPS, SWITCH, TOKENS_PER_STEP = 200, 150, 1000
SAMPLES_PER_STEP = 10


def training_line(step: int, *, sources: Sequence[str] = ("web", "code", "qa"), **changes: Any) -> dict[str, Any]:
    """Return a training line: the loss is 5 - step / 100, and `qa` is read after the switch only."""
    is_second = step > SWITCH
    read = {name: 5 - step / 100 + 0.1 * place for place, name in enumerate(sources) if is_second or name != "qa"}
    samples = {name: 4 * step for name in sources if name != "qa"} | {"qa": 2 * max(step - SWITCH, 0)}
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "global_batch": SAMPLES_PER_STEP,
        "seq_length": 100,
        "phase": "qa" if is_second else "general",
        "lr": rate(step),
        "loss": 5 - step / 100,
        "grad_norm": 1.0,
        "tokens_per_second": 500.0,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.1,
        "sync_wait_seconds": 0.25,
        "pause_seconds": 1.0,
        "tflops_per_gpu": 1.5,
        "mfu": 0.4,
        "peak_memory_gib": 3.0,
        "reserved_memory_gib": None,
        "eta": 1.0,
        "loss_by_source": read,
        "samples_by_source": samples,
        "skipped_updates": 0,
        **changes,
    }


def rate(step: int) -> float:
    """Return the learning rate of `plan`'s schedule."""
    share = 0.5 * (1 + math.cos(math.pi * (step - 1) / STEPS))
    return 1e-3 * share + 1e-5 * (1 - share)


def validation_line(step: int, **losses: float) -> dict[str, Any]:
    """Return a validation line."""
    return {"step": step, "validation": losses}


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def plan() -> dict[str, Any]:
    """Return the plan.json of the run, as far as a report needs it."""

    def phase(name: str, first: int, last: int, weights: Mapping[str, float]) -> dict[str, Any]:
        steps = last - first + 1
        uses = {
            source: {"weight": weight, "samples": round(weight * steps * SAMPLES_PER_STEP)}
            for source, weight in weights.items()
        }
        return {
            "name": name,
            "first_step": first,
            "last_step": last,
            "tokens": steps * TOKENS_PER_STEP,
            "sources": uses,
        }

    source = {"size": 160_000, "samples": 800, "tokens": 80_000, "epochs": 0.5, "max_epochs": 4.0}
    return {
        "name": "small",
        "steps": STEPS,
        "tokens_trained": STEPS * TOKENS_PER_STEP,
        "memory_per_gpu_gib": 2.5,
        "schedule": {"shape": "cosine", "max_lr": 1e-3, "min_lr": 1e-5, "steps": STEPS},
        "phases": [
            phase("general", 1, SWITCH, {"web": 0.5, "code": 0.5}),
            phase("qa", SWITCH + 1, STEPS, {"web": 0.4, "code": 0.4, "qa": 0.2}),
        ],
        "sources": {"web": source, "code": source, "qa": {**source, "samples": 100, "tokens": 10_000}},
    }


def config(**changes: Any) -> dict[str, Any]:
    """Return the run.yaml of the run."""
    return {
        "name": "small",
        "output": "out",
        "seq_length": 100,
        "batch": {"global": SAMPLES_PER_STEP, "micro": 2},
        "schedule": {"shape": "cosine", "max_lr": 1e-3, "min_lr": 1e-5},
        "phases": [{"name": "general", "blend": {"web": 0.5}}, {"name": "qa", "blend": {"web": 0.4}}],
        **changes,
    }


def anomaly(step: int, **changes: Any) -> dict[str, Any]:
    """Return a line of anomalies.jsonl: a spike in which `code` has the highest loss."""
    samples = [
        {"source": "web", "k": 4, "epoch": 0, "prefix": "data/web", "documents": [7]},
        {"source": "code", "k": 9, "epoch": 1, "prefix": "data/code", "documents": [30, 31]},
    ]
    return {
        "step": step,
        "kind": "spike",
        "value": 9.5,
        "limit": 6.0,
        "action": "warn",
        "loss_by_source": {"web": 4.0, "code": 15.0},
        "samples": samples,
        **changes,
    }


def write_run(
    folder: Path,
    *,
    name: str = "small",
    every: int = 10,
    gain: float = 0.3,
    with_tasks: bool = True,
    with_trouble: bool = True,
) -> Path:
    """Write a finished run of 200 steps with a switch after step 150, and return its folder.

    Held-out loss of `qa` falls by `gain`, of `web` by a third of it, and of `code` it rises by 0.05.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(name=name)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "plan.json").write_bytes(orjson.dumps({**plan(), "name": name}))
    lines: list[dict[str, Any]] = []
    for step in range(0, STEPS + 1, every):
        share = step / STEPS
        if step:
            lines.append(training_line(step))
        if step % 50 == 0:
            web, code, qa = 4.0 - gain / 3 * share, 3.0 + 0.05 * share, 5.0 - gain * share
            lines.append(validation_line(step, web=web, code=code, qa=qa))
        if with_tasks and step in (0, 150, 200):
            quiz = {"acc,none": 0.3 + gain * share, "acc_stderr,none": 0.02, "bits_per_byte,none": 1.5 - share / 10}
            trivia = {"acc,none": 0.5 - 0.01 * share, "acc_stderr,none": 0.03}
            lines.append({"step": step, "evaluation": {"quiz": quiz, "trivia": trivia}})
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(
        folder / "plans.jsonl", [{"after_step": 0, "run": settings, "data_fingerprints": {"web": "web-digest"}}]
    )
    _write_checkpoint(folder, STEPS)
    if with_trouble:
        write_lines(folder / "anomalies.jsonl", [anomaly(90), anomaly(91, kind="loss", value=None, action="skip")])
        write_lines(folder / "events.jsonl", [
            {"event": "start", "time": 1_700_000_000.0, "step": 0, "from": "base", "resumed": False, "ranks": 4,
             "device": "cuda", "startup_seconds": 20.0, "skipped_checkpoints": [],
             "versions": {"megatron_cpt": "0.1.0", "torch": "2.13.0"}},
            {"event": "start", "time": 1_700_000_300.0, "step": 100, "from": "out/checkpoints/step-00000100",
             "resumed": True, "ranks": 4, "device": "cuda", "startup_seconds": 15.0,
             "skipped_checkpoints": ["step-00000120"], "versions": {"megatron_cpt": "0.1.0", "torch": "2.13.0"}},
            {"event": "stop", "time": 1_700_000_600.0, "step": 200, "reason": "", "pause_seconds": 5.0},
        ])  # fmt: skip
    return folder


def _write_checkpoint(folder: Path, step: int) -> None:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    state = {
        "format_version": 1,
        "layout": {"world_size": 4},
        "tokenizer_fingerprint": "tokenizer-digest",
        "data_fingerprints": {"web": "web-digest"},
        "versions": {"megatron_cpt": "0.1.0"},
    }
    (checkpoint / "state.json").write_bytes(orjson.dumps(state))
    (checkpoint / "manifest.json").write_bytes(b"{}")
