"""Stand-in for `megatron-cpt train RUN.yaml` that writes a run directory without training; imports no torch.

    python stand_in_train.py train RUN.yaml

Each step is a line of metrics.jsonl; the held-out loss after the last step depends on the seed and on `max_lr` alone. A
file `wait-after-N` in the folder above the runs stops every run after step N until SIGTERM, which ends it with 75, as
after a save. A file `fail-ARM` there fails the runs of an arm with status 3.
"""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path
from typing import Any

import yaml


def final_loss(run: dict[str, Any], source: str) -> float:
    """Loss after the last step: noise by seed and source, and the learning rate."""
    noise = random.Random(f"{run['seed']}-{source}").uniform(-0.01, 0.01)
    return 5.0 + noise - 100 * float(run["schedule"]["max_lr"])


def main(arguments: list[str]) -> None:
    """Write the run directory, or resume it."""
    run = yaml.safe_load(Path(arguments[-1]).read_text())
    output = Path(run["output"])
    marks = output.parents[1]
    output.mkdir(parents=True, exist_ok=True)
    (output / "run.yaml").write_text(Path(arguments[-1]).read_text())
    with (marks / "starts.txt").open("a") as starts:
        starts.write(f"{output.parent.name}/{output.name}\n")
    if (marks / f"fail-{output.parent.name}").exists():
        print("megatron-cpt: error: the stand-in fails, as the file says", file=sys.stderr)
        sys.exit(3)
    stop = [int(path.name.rpartition("-")[2]) for path in marks.glob("wait-after-*")]
    sources = list(run["validation"]["sources"])
    steps = -(-run["tokens"] // (run["batch"]["global"] * run["seq_length"]))
    metrics = output / "metrics.jsonl"
    done = metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    with metrics.open("a") as file:
        for step in range(done + 1, steps + 1):
            line = {"step": step, "tokens": step, "phase": "general", "lr": 1e-3, "loss": 6.0, "grad_norm": 1.0}
            file.write(json.dumps(line) + "\n")
            if step == steps:
                losses = {source: final_loss(run, source) for source in sources}
                file.write(json.dumps({"step": step, "validation": losses}) + "\n")
            file.flush()
            if step in stop:
                signal.pause()
    (output / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    main(sys.argv[1:])
