"""Train the small runs and the longer arms that `benchmarks/law.py` was first measured on.

    make demo                                             # real text in data/quickstart
    python benchmarks/law_runs.py /tmp/law_runs           # about 17 minutes of processor time
    R=/tmp/law_runs; python benchmarks/law.py --fit $R/small-* --held-out $R/arm-*

A trunk of 0.66M parameters is trained on 2M tokens of web text and code, down to a tenth of its rate. Twelve small runs
of at most 61,440 tokens, 5 % of the arms, continue it with questions and answers at other shares, switches and
schedules. The arms have another seed, so their training samples come in another order.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parents[1] / "data" / "quickstart"
SOURCES = {"web": ("web", "articles", "excerpts"), "code": ("code", "manual"), "qa": ("exams", "boolq")}
HELD_OUT = ("c4", "github", "exams", "boolq")
GENERAL = {"web": 0.7, "code": 0.3}
SMALL_TOKENS = 61_440
TRUNK_RATE = 6e-4  # the rate that the trunk ends on

Blend = dict[str, float]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, changes in runs(folder):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**common(folder / name, changes), **changes}, sort_keys=False))
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        subprocess.run([sys.executable, "-m", "megatron_cpt", "train", path], check=True, env=environment)


def runs(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and keys of run.yaml of the trunk, the small runs and the arms."""
    schedule = {"shape": "cosine", "max_lr": 10 * TRUNK_RATE, "min_lr": TRUNK_RATE, "warmup": 0.05}
    yield "trunk", {"seed": 1, "tokens": 2_000_000, "schedule": schedule, "phases": one(GENERAL), **every(500)}
    start = {"init": {"from": str(folder / "trunk")}}
    for name, (schedule, phases) in small_runs().items():
        run = {"seed": 11, "tokens": SMALL_TOKENS, "schedule": schedule, "phases": phases, **every(3)}
        yield f"small-{name}", {**run, **start}
        if name in ("base", "qa10"):
            yield f"small-{name}-half", {**run, **start, "seed": 12, "tokens": SMALL_TOKENS // 2}
    for name, (schedule, phases) in arms().items():
        run = {"seed": 21, "tokens": 20 * SMALL_TOKENS, "schedule": schedule, "phases": phases, **every(60)}
        yield f"arm-{name}", {**run, **start}


def small_runs() -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    return {
        "base": (rates(), one(GENERAL)),
        "qa10": (rates(), one(qa(0.1))),
        "qa30": (rates(), one(qa(0.3))),
        "switch5": (rates(), two(GENERAL, qa(0.2), 0.2)),
        "switch2": (rates(), two(GENERAL, qa(0.2), 0.5)),
        "linear": (rates("linear", 0.1), one(qa(0.1))),
        "constant": (rates("constant"), one(qa(0.2))),
        "constant-base": (rates("constant"), one(GENERAL)),
        "code": (rates(), one({"web": 0.4, "code": 0.5, "qa": 0.1})),
        "wsd": (rates("wsd"), two({"web": 0.5, "code": 0.5}, qa(0.4), 0.6)),
    }


def arms() -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    return {
        "base": (rates(), one(GENERAL)),
        "qa10": (rates(), one(qa(0.1))),
        "switch5": (rates(), two(GENERAL, qa(0.2), 0.2)),
        "switch2": (rates(low=0.1), two(GENERAL, qa(0.25), 0.5)),
        "wsd": (rates("wsd"), two(GENERAL, qa(0.3), 0.9)),
    }


def qa(share: float) -> Blend:
    return {name: weight * (1 - share) for name, weight in GENERAL.items()} | {"qa": share}


def one(blend: Blend) -> list[dict[str, Any]]:
    return [{"name": "all", "blend": blend}]


def two(first: Blend, second: Blend, fraction: float) -> list[dict[str, Any]]:
    return [{"name": "general", "blend": first, "until": {"lr": fraction}}, {"name": "qa", "blend": second}]


def rates(shape: str = "cosine", low: float = 0.01) -> dict[str, Any]:
    return {"shape": shape, "max_lr": TRUNK_RATE, "min_lr": TRUNK_RATE * low}


def every(steps: int) -> dict[str, Any]:
    sources = {name: str(DATA / "heldout" / name) for name in HELD_OUT}
    return {"validation": {"every": steps, "batches": 4, "sources": sources}}


def common(output: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that all runs share; the trunk reads no questions and answers."""
    model = {"hidden": 64, "ffn_hidden": 256, "layers": 3, "heads": 4, "kv_groups": 2, "head_dim": 16}
    names = {name for phase in changes["phases"] for name in phase["blend"]}
    return {
        "name": output.name,
        "output": str(output),
        "model": {"preset": "tiny_nemotron", "vocab": 4096, **model},
        "tokenizer": f"sentencepiece:{DATA / 'tokenizer.model'}",
        "seq_length": 128,
        "batch": {"global": 16, "micro": 16},
        "sources": {
            name: {"path": [str(DATA / "train" / part) for part in parts]}
            for name, parts in SOURCES.items()
            if name in names
        },
        "precision": {"compute": "fp32"},
        "checkpoint": {"every": 100_000, "keep": 1},
        "log": {"every": 20},
    }


if __name__ == "__main__":
    main()
