"""Overhead of our training loop over a bare megatron-core loop of the same model.

    python benchmarks/loop_overhead.py [--blocks 7] [--steps 10]

One process, one model, one optimizer. The real `Trainer` runs (loader, blend, loss by source, metrics.jsonl, console,
stop signals). After each block of its steps a hook runs the same number of steps of a bare loop on the same model: only
megatron-core's forward-backward function and optimizer, on one batch in memory. The blocks alternate, so slow changes
of the machine affect both. The result is the median ratio of neighboring blocks, in wall time and in processor time
(which does not depend on other processes).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from record import machine, write_result

from megatron_cpt.data import IndexedDatasetWriter
from megatron_cpt.hooks import Hook
from megatron_cpt.prepare import prepare_run
from megatron_cpt.train.trainer import Trainer

SEQ_LENGTH, GLOBAL, MICRO = 256, 16, 8
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each loop")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = run(Path(folder), options.blocks, options.steps)
    overhead = {
        clock: overhead_of([block[clock] for block in ours], [block[clock] for block in bare]) for clock in CLOCKS
    }
    for clock, value in overhead.items():
        print(f"{clock} time: {value:+.2%} over the bare loop")
    write_result(
        "loop_overhead",
        {
            "machine": machine(),
            "what": f"tiny_nemotron with 4,096 ids, {GLOBAL} x {SEQ_LENGTH} tokens per step, fp32, one process",
            "steps_a_block": options.steps,
            "seconds_ours": ours,
            "seconds_bare": bare,
            "overhead": overhead,
            "target": "under 3 %",
        },
    )


def overhead_of(ours: list[float], bare: list[float]) -> float:
    """Return the median ratio of neighboring blocks, minus 1."""
    return statistics.median(a / b for a, b in zip(ours, bare, strict=True)) - 1


def read_clocks() -> dict[str, float]:
    """Return the current time of both clocks."""
    return {clock: read() for clock, read in CLOCKS.items()}


def seconds_since(start: dict[str, float]) -> dict[str, float]:
    """Return the seconds since `start` on both clocks."""
    return {clock: value - start[clock] for clock, value in read_clocks().items()}


def run(folder: Path, blocks: int, steps: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the seconds of each block of our loop and of the bare loop."""
    prepared = prepare_run(run_file(folder, (blocks + 1) * steps), need_files=True)
    alternate = AlternatingHook(steps)
    with Trainer(prepared, hooks=[alternate], console=True, owns_process=True) as trainer:
        trainer.fit()
    return alternate.ours[1:], alternate.bare[1:]  # the first blocks warm up


def run_file(folder: Path, steps: int) -> Path:
    """Write a run over two sources of random tokens, logged every step, which costs most."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        with IndexedDatasetWriter(str(folder / name), np.uint16) as writer:
            writer.add_document(rng.integers(0, 4096, size=2_000_000).astype(np.uint16))
    run = {
        "name": "loop-overhead",
        "output": str(folder / "out"),
        "model": {"preset": "tiny_nemotron", "vocab": 4096},
        "seq_length": SEQ_LENGTH,
        "batch": {"global": GLOBAL, "micro": MICRO},
        "tokens": steps * GLOBAL * SEQ_LENGTH,
        "schedule": {"max_lr": 1e-4, "min_lr": 1e-6},
        "sources": {name: {"path": str(folder / name)} for name in ("a", "b")},
        "phases": [
            {"name": "one", "blend": {"a": 0.7, "b": 0.3}, "until": {"lr": 0.2}},
            {"name": "two", "blend": {"a": 0.4, "b": 0.6}},
        ],
        "precision": {"compute": "fp32"},
        "log": {"every": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


class AlternatingHook(Hook):
    """Timer of blocks of the loop; runs a block of the bare loop after each.

    It is the last hook, so `ours` contains everything between two of its calls.
    """

    def __init__(self, steps: int) -> None:
        self.ours: list[dict[str, float]] = []
        self.bare: list[dict[str, float]] = []
        self._steps = steps

    def on_start(self, session: Any) -> None:
        """Start the first block."""
        self._run_bare_step = make_bare_step(session)
        self._started = read_clocks()

    def on_step(self, session: Any) -> None:
        """At the end of a block, run a block of the bare loop."""
        if session.state.step % self._steps:
            return
        self.ours.append(seconds_since(self._started))
        before = read_clocks()
        for _ in range(self._steps):
            self._run_bare_step()
        self.bare.append(seconds_since(before))
        self._started = read_clocks()


def make_bare_step(session: Any) -> Any:
    """Return the smallest training step: megatron-core's schedule and optimizer on a batch in memory."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks, optimizer = list(session.model.chunks), session.optimizer
    tokens = torch.randint(0, 4096, (MICRO, SEQ_LENGTH + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(SEQ_LENGTH).expand(MICRO, -1)
    forward_backward = get_forward_backward_func()

    def loss_func(losses: Any) -> Any:
        return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {}

    def forward_step(_: Any, chunk: Any) -> Any:
        return chunk(inputs, positions, None, labels=labels), loss_func

    def step() -> None:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward_step,
            data_iterator=None,
            model=chunks,
            num_microbatches=GLOBAL // MICRO,
            seq_length=SEQ_LENGTH,
            micro_batch_size=MICRO,
            forward_only=False,
        )
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
