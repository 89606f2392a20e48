"""A small run on synthetic text that a small model can learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

from megatron_cpt.data import IndexedDatasetWriter

EOD = 256


def write_source(prefix: Path, *, stride: int, documents: int = 60, seed: int = 0) -> None:
    """Documents in which each byte is the last one plus a small random step; `stride` makes sources differ."""
    rng = np.random.default_rng([seed, stride])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for _ in range(documents):
            steps = rng.integers(0, 2 + stride, size=rng.integers(20, 400))
            text = (rng.integers(0, 256) + np.cumsum(steps)) % 256
            writer.add_document(np.append(text, EOD).astype(np.uint16))


def small_run(folder: Path, **changes: Any) -> Path:
    """Write run.yaml and its data into a folder: 20 steps, a phase switch after step 15; returns the file."""
    for stride, name in enumerate(("web", "code", "qa"), start=1):
        write_source(folder / "data" / name, stride=stride)
    run = {
        "name": "small",
        "output": str(folder / "out"),
        "model": {"preset": "tiny_nemotron"},
        "seq_length": 32,
        "batch": {"global": 8, "micro": 2},
        "tokens": 20 * 8 * 32,
        "schedule": {"shape": "cosine", "max_lr": 1e-3, "min_lr": 1e-5},
        "sources": {name: {"path": str(folder / "data" / name)} for name in ("web", "code", "qa")},
        "phases": [
            {"name": "general", "blend": {"web": 0.6, "code": 0.4}, "until": {"lr": 0.2}},
            {"name": "qa", "blend": {"web": 0.5, "code": 0.3, "qa": 0.2}},
        ],
        "precision": {"compute": "fp32"},
        "log": {"every": 1},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def train_here(path: str, overrides: Sequence[str] = (), allow: Sequence[str] = ()) -> int:
    """`megatron-cpt train` on this rank of a job that a test started."""
    from megatron_cpt.hooks import build_hooks
    from megatron_cpt.train.run import run_training

    return run_training(path, overrides, allow, build_hooks)


def train_several(path: str, runs: Sequence[Sequence[str]]) -> list[int]:
    """Several runs one after the other in the same processes."""
    return [train_here(path, overrides) for overrides in runs]


def read_metrics(output: str | Path, kind: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a key."""
    lines = [orjson.loads(line) for line in (Path(output) / "metrics.jsonl").read_bytes().splitlines()]
    return [line for line in lines if kind in line]


def newest(output: str | Path) -> Path:
    """The checkpoint that `latest` names."""
    folder = Path(output) / "checkpoints"
    return folder / (folder / "latest").read_text().strip()
