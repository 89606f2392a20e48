"""A small run on synthetic text that a small model can learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

from megatron_cpt.data import IndexedDatasetWriter

EOD = 256
MACHINE_KEYS = (
    *("tokens_per_second", "step_seconds", "data_wait_seconds", "sync_wait_seconds", "pause_seconds"),
    *("tflops_per_gpu", "mfu", "peak_memory_gib", "reserved_memory_gib", "eta"),
)


def write_source(prefix: Path, *, stride: int, documents: int = 60, seed: int = 0) -> None:
    """Write documents in which each byte is the previous byte plus a random step of 0 to 1 + `stride`."""
    rng = np.random.default_rng([seed, stride])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for _ in range(documents):
            steps = rng.integers(0, 2 + stride, size=rng.integers(20, 400))
            text = (rng.integers(0, 256) + np.cumsum(steps)) % 256
            writer.add_document(np.append(text, EOD).astype(np.uint16))


def small_run(folder: Path, **changes: Any) -> Path:
    """Write a run.yaml and its data into a folder, and return the file: 20 steps, with a phase switch after step 15."""
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


def train_here(path: str, overrides: Sequence[str] = (), allow: Sequence[str] = (), *, restart: bool = False) -> int:
    """Run `megatron-cpt train` on this rank of a job that a test started; return its exit status."""
    return train_with_hooks(path, overrides, allow=allow, restart=restart)


def train_with_hooks(
    path: str,
    overrides: Sequence[str] = (),
    *,
    hooks: Sequence[Any] = (),
    allow: Sequence[str] = (),
    restart: bool = False,
    prepare: Callable[[Any], None] = lambda trainer: None,
) -> int:
    """Run `megatron-cpt train` with hooks of the test.

    Args:
        path, overrides, allow, restart: arguments of the command.
        hooks: called after the hooks of the run.
        prepare: changes the opened trainer before it trains.
    """
    from megatron_cpt.backend import launched_world_size
    from megatron_cpt.prepare import prepare_run
    from megatron_cpt.train.trainer import Trainer

    prepared = prepare_run(path, overrides, need_files=True, num_gpus=launched_world_size())
    with Trainer(prepared, hooks=hooks, allow=allow, restart=restart, console=True, owns_process=True) as trainer:
        prepare(trainer)
        return trainer.fit().status


def train_several(path: str, runs: Sequence[Sequence[str]]) -> list[int]:
    """Train several runs one after the other in the same processes."""
    return [train_here(path, overrides) for overrides in runs]


def read_metrics(output: str | Path, kind: str = "loss") -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that have a key."""
    lines = [orjson.loads(line) for line in (Path(output) / "metrics.jsonl").read_bytes().splitlines()]
    return [line for line in lines if kind in line]


def read_reproducible_metrics(output: str | Path) -> list[dict[str, Any]]:
    """Return the training lines of metrics.jsonl without the values that depend on the machine."""
    return [{key: value for key, value in line.items() if key not in MACHINE_KEYS} for line in read_metrics(output)]


def newest(output: str | Path) -> Path:
    """Return the checkpoint that `latest` names."""
    folder = Path(output) / "checkpoints"
    return folder / (folder / "latest").read_text().strip()
