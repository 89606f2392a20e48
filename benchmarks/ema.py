"""Time of the moving average of the weights (EMA) relative to a step of the same run without it.

    python benchmarks/ema.py [--blocks 12] [--steps 10]

One process, one model, one run of the real `Trainer` with an `ema` section. Blocks of steps with and without the update
of the average alternate, so slow changes of the machine affect both. The result is the median ratio of neighboring
blocks, in wall time and in processor time (which does not depend on other processes). `tiny_nemotron` is bound by
memory more than a large model on a GPU is: it trains on 4,096 tokens per step, a large one on millions.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from loop_overhead import CLOCKS, GLOBAL, SEQ_LENGTH, overhead_of, read_clocks, run_file, seconds_since
from record import machine, write_result

from megatron_cpt.hooks import Hook
from megatron_cpt.prepare import prepare_run
from megatron_cpt.train.trainer import Trainer


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12, help="blocks with and without the average, each")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = run_file(Path(folder), 2 * (options.blocks + 1) * options.steps)
        blocks = AlternatingEma(options.steps)
        prepared = prepare_run(path, ["ema={decay: 0.999, every: 1}", "log.every=1000"], need_files=True)
        with Trainer(prepared, hooks=[blocks], console=True, owns_process=True) as trainer:
            trainer.fit()
    average, without = blocks.seconds[True][1:], blocks.seconds[False][1:]  # the first blocks warm up
    overhead = {
        clock: overhead_of([block[clock] for block in average], [block[clock] for block in without]) for clock in CLOCKS
    }
    for clock, value in overhead.items():
        print(f"{clock} time: {value:+.2%} over the same run without the average")
    write_result(
        "ema",
        {
            "machine": machine(),
            "load_before": load_before,
            "what": f"tiny_nemotron with 4,096 ids, {GLOBAL} x {SEQ_LENGTH} tokens per step, fp32, one process",
            "steps_a_block": options.steps,
            "seconds_with": average,
            "seconds_without": without,
            "overhead": overhead,
            "target": "at most 2 %",
        },
    )


class AlternatingEma(Hook):
    """Switch that turns the update of the average off in every second block of steps, and times the blocks.

    Attributes:
        seconds: by whether the average is updated: the times of each block.
    """

    def __init__(self, steps: int) -> None:
        self.seconds: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        self._steps, self._is_on = steps, True

    def on_start(self, session: Any) -> None:
        """Put the switch in front of the update, and start the first block."""
        update = session.ema.update
        session.ema.update = lambda step: update(step) if self._is_on else None
        self._started = read_clocks()

    def on_step(self, session: Any) -> None:
        """Start the next block at the end of a block."""
        if session.state.step % self._steps == 0:
            self.seconds[self._is_on].append(seconds_since(self._started))
            self._is_on = not self._is_on
            self._started = read_clocks()


if __name__ == "__main__":
    main()
