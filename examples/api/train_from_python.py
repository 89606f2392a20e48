"""Train from Python with a hook of your own.

python examples/api/train_from_python.py runs/api
torchrun --nproc-per-node 2 examples/api/train_from_python.py runs/api
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import megatron_cpt as cpt


class LossCurve(cpt.Hook):
    """Collects the loss of every line of metrics and draws it at the end."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_metrics(self, session: Any, line: dict[str, Any]) -> None:
        """Collect a loss; called on every rank."""
        self.losses[line["step"]] = line["loss"]

    def on_stop(self, session: Any, reason: str) -> None:
        """Draw one bar per line of metrics, on one rank only."""
        if session.ranks.is_main:
            for step, loss in self.losses.items():
                print(f"step {step:3}  loss {loss:.3f}  {'#' * round(10 * loss)}")


def main() -> None:
    """Train the run of run.yaml with data and output under the folder that the command line names."""
    folder = Path(sys.argv[1])
    run_file = Path(__file__).with_name("run.yaml")
    run = cpt.load_run(run_file, [f"output={folder}/out", f"sources.text.path={folder}/text"])
    with cpt.Trainer(run, hooks=[LossCurve()]) as trainer:
        result = trainer.fit()
        if trainer.session.ranks.is_main:
            print(result)


if __name__ == "__main__":
    main()
