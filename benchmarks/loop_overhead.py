"""What our loop costs on top of a bare megatron-core loop of the same model.

    python benchmarks/loop_overhead.py [--blocks 7] [--steps 10]

One process, one model, one optimizer. The real `train()` runs (loader, blend, loss by source, metrics.jsonl, console,
stop signal), and between blocks of its steps a hook runs as many steps of a bare loop on the same model:
megatron-core's forward-backward function and optimizer on one batch that lies in memory, nothing else. Block times
alternate, so drift of the machine meets both; the figures are the medians of the ratios of neighboring blocks, in wall
time and in processor time (which a busy neighbor on the machine does not lengthen).
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

from megatron_cpt.backend import StopRequest, cpu, process_groups
from megatron_cpt.config import ParallelConfig
from megatron_cpt.data import IndexedDatasetWriter

SEQ_LENGTH, GLOBAL, MICRO = 256, 16, 8
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each loop")
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    options = parser.parse_args()
    cpu.install()
    with tempfile.TemporaryDirectory() as folder, process_groups(ParallelConfig()) as ranks:
        ours, bare = run(Path(folder), ranks, options.blocks, options.steps)
    overhead = {
        clock: overhead_of([block[clock] for block in ours], [block[clock] for block in bare]) for clock in CLOCKS
    }
    for clock, value in overhead.items():
        print(f"{clock} time: {value:+.2%} over the bare loop")
    write_result(
        "loop_overhead",
        {
            "machine": machine(),
            "what": f"tiny_nemotron with 4,096 ids, {GLOBAL} x {SEQ_LENGTH} tokens a step, fp32, one process",
            "steps_a_block": options.steps,
            "seconds_ours": ours,
            "seconds_bare": bare,
            "overhead": overhead,
            "target": "under 3 %",
        },
    )


def overhead_of(ours: list[float], bare: list[float]) -> float:
    """Median of the ratios of neighboring blocks, less 1."""
    return statistics.median(a / b for a, b in zip(ours, bare, strict=True)) - 1


def read_clocks() -> dict[str, float]:
    """Both clocks, now."""
    return {clock: read() for clock, read in CLOCKS.items()}


def since(start: dict[str, float]) -> dict[str, float]:
    """Seconds on both clocks."""
    return {clock: value - start[clock] for clock, value in read_clocks().items()}


def run(folder: Path, ranks: Any, blocks: int, steps: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Seconds of each block: ours, bare."""
    from megatron_cpt.hooks import build_hooks
    from megatron_cpt.prepare import prepare_run
    from megatron_cpt.train.setup import setup
    from megatron_cpt.train.trainer import train

    prepared = prepare_run(run_file(folder, (blocks + 1) * steps), need_files=True)
    session = setup(prepared.config, prepared.plan, ranks, eod_id=None)
    session.output.mkdir()
    alternate = make_alternating_hook(session, steps)
    hooks = [*build_hooks(prepared.config), alternate]
    try:
        train(session, hooks, StopRequest())
    finally:
        session.loader.close()
        for hook in hooks:
            hook.on_end(session)
    return alternate.ours[1:], alternate.bare[1:]  # the first blocks warm up


def run_file(folder: Path, steps: int) -> Path:
    """A run over two sources of random tokens, logged every step: the dearest setting."""
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


def make_alternating_hook(session: Any, steps: int) -> Any:
    """A hook that times blocks of the loop it is called from, and runs a bare block after each."""
    from megatron_cpt.train.hook import Hook

    class Alternate(Hook):
        """Called last in every step; `ours` counts all that happens between two of its calls."""

        def __init__(self) -> None:
            self.ours: list[dict[str, float]] = []
            self.bare: list[dict[str, float]] = []
            self._bare_step = make_bare_step(session)

        def on_start(self, session: Any) -> None:
            self._started = read_clocks()

        def on_step(self, session: Any) -> None:
            if session.state.step % steps:
                return
            self.ours.append(since(self._started))
            before = read_clocks()
            for _ in range(steps):
                self._bare_step()
            self.bare.append(since(before))
            self._started = read_clocks()

    return Alternate()


def make_bare_step(session: Any) -> Any:
    """The least that trains: megatron-core's schedule and optimizer on a batch in memory."""
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
