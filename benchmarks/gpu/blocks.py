"""Measure layers of Nemotron-4 15B at full width on one GPU: tokens/s, TFLOP/s and MFU, in bf16 and FP8.

    python benchmarks/gpu/blocks.py [--layers N] [--micro N] [--steps N] [--rounds N]     (make gpu-bench)
    python benchmarks/gpu/blocks.py --rehearse       same code at toy width on any machine; writes nothing

The model has as many layers as fit in memory, and a vocabulary of 16,384 instead of 256,000, because embedding and head
with their optimizer state would fill the GPU. Sequences have 4,096 tokens; Adam keeps fp32 master weights. These are
timed in turn, each in a process of its own, for several rounds; results are printed and written after each round:

- ours: `train_step` of a run with the default `speed` settings of the machine, data in memory;
- bare: a minimal loop on megatron-core's layers, DDP, schedule and optimizer, with the same shapes and fused kernels;
- both with FP8 (delayed and tensorwise scaling) if Transformer Engine is installed;
- the ceiling: matrix products of the MLP's shapes, torch.matmul in bf16 and torch._scaled_mm in FP8.

Convention: FLOPs as in `planning/cost/parameters.py`, forward and backward, without recomputation; `full` counts
attention as if it were not causal, as Megatron-LM does. MFU (model FLOPs utilization) is `full` over the datasheet's
dense bf16 peak, also for FP8, so that the two can be compared; `of_ceiling` is relative to the matrix products of the
same call. Medians over steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.bare_loop import bare_steps
from benchmarks.record import machine, write_result
from megatron_cpt.config import ModelConfig, RunConfig, draft_config
from megatron_cpt.planning.cost.parameters import flops_per_token
from megatron_cpt.planning.hardware import GPUS

PRECISIONS = {
    "bf16": {"compute": "bf16"},
    "fp8 delayed": {"compute": "bf16", "fp8": {"recipe": "delayed"}},
    "fp8 tensorwise": {"compute": "bf16", "fp8": {"recipe": "tensorwise"}},
}
WIDTH = {"preset": "nemotron4_15b", "vocab": 16_384}
TOY = {"preset": "tiny_nemotron", "vocab": 512}
OUT_OF_MEMORY = 17  # exit status of a child process


def run_config(arguments: argparse.Namespace, precision: str) -> RunConfig:
    """Return the timed run: one data-parallel rank, four micro-batches per step."""
    model = {**(TOY if arguments.rehearse else WIDTH), "layers": arguments.layers}
    length = 64 if arguments.rehearse else 4096
    return draft_config(
        {
            "name": "blocks",
            "output": "runs/blocks",
            "model": model,
            "seq_length": length,
            "batch": {"global": 4 * arguments.micro, "micro": arguments.micro},
            "tokens": 4 * arguments.micro * length,
            "schedule": {"max_lr": 1e-5},
            "sources": {"random": {"path": "random"}},
            "phases": [{"name": "only", "blend": {"random": 1.0}}],
            "precision": PRECISIONS[precision],
        }
    ).finish("blocks")


def our_steps(run: RunConfig) -> Callable[[], None]:
    """Return a training step of a run: forward, backward, agreement of the ranks, update."""
    import torch

    from megatron_cpt.backend import seed_everything
    from megatron_cpt.data import StepData
    from megatron_cpt.model import build_model
    from megatron_cpt.optim.build_optimizer import build_optimizer
    from megatron_cpt.optim.update import Update
    from megatron_cpt.train.forward import ForwardPass
    from megatron_cpt.train.step import train_step

    seed_everything(run.seed, pipeline_rank=0)
    build_model.initialize_weights = draw_on_device  # drawing billions of weights on the CPU takes too long
    model = build_model.build_model(run)
    optimizer = build_optimizer(run.optimizer, run.schedule, run.parallel, run.precision, model.chunks)
    update = Update(optimizer, run.optimizer.weight_decay)
    forward = ForwardPass(model, 1, 1, torch.device(torch.cuda.current_device()))
    data = StepData(random_batches(run), run.tokens_per_step, {}, {})
    print(f"layers: {model.layers}; speed: {', '.join(sorted(model.knobs))}", file=sys.stderr)

    def step() -> None:
        train_step(
            forward,
            update,
            data,
            1e-5,
            counts=True,
            requests=lambda: [],
            judge=lambda *_: None,
            before_update=lambda: None,
        )

    return step


def draw_on_device(chunks: Any, model: ModelConfig, seed: int) -> None:
    """Fill matrices with random values on the device; replaces the initialization that is equal for all layouts."""
    import torch

    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=model.init_std)


def random_batches(run: RunConfig) -> list[Any]:
    """Return the micro-batches of a step."""
    import numpy as np

    from megatron_cpt.data.loading.batch import make_batch

    rng = np.random.default_rng(0)
    shape = (run.batch.global_ // run.batch.micro, run.batch.micro, run.seq_length + 1)
    return [make_batch(list(micro), [0] * run.batch.micro) for micro in rng.integers(0, run.model.vocab, shape)]


def time_steps(run: RunConfig, which: str, num_steps: int) -> dict[str, Any]:
    """Return the seconds of each step after three for warm-up, and the peak memory."""
    import torch

    from megatron_cpt.backend import process_groups

    with process_groups(run.parallel):
        step = our_steps(run) if which == "ours" else bare_steps(run, random_batches(run))
        seconds = []
        for _ in range(3 + num_steps):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds[3:], "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def ceilings(*, rehearse: bool) -> dict[str, float]:
    """Return the TFLOP/s of matrix products of the MLP's shape: 8,192 tokens, 6,144 to 24,576."""
    import torch

    m, k, n = (64, 64, 64) if rehearse else (8192, 6144, 24_576)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(*shape, device=device).bfloat16() for shape in ((m, k), (n, k)))
    products = {"bf16": lambda: a @ b.T}
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
        products["fp8"] = lambda: torch._scaled_mm(
            a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return {name: 2 * m * k * n / _seconds(product, device) / 1e12 for name, product in products.items()}


def _seconds(function: Callable[[], Any], device: str, repeats: int = 50) -> float:
    """Return the seconds per call with all calls queued: the best of five measurements."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = float("inf")
    for _ in range(5):
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        wait()
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best


def child(arguments: argparse.Namespace) -> int:
    """Measure in this process and print one line of JSON."""
    if arguments.child == "ceiling":
        print(json.dumps(ceilings(rehearse=arguments.rehearse)))
        return 0
    from megatron_cpt.backend import cpu

    cpu.install()
    import torch

    try:
        run = run_config(arguments, arguments.precision)
        print(json.dumps(time_steps(run, arguments.child, arguments.steps)))
    except torch.cuda.OutOfMemoryError:
        return OUT_OF_MEMORY
    return 0


def call(arguments: argparse.Namespace, which: str, precision: str = "bf16") -> dict[str, Any] | None:
    """Measure in a child process; return None if it ran out of memory."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("layers", "micro", "steps")]
    options += ["--rehearse"] if arguments.rehearse else []
    command = [sys.executable, __file__, f"--child={which}", f"--precision={precision}", *options]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode == OUT_OF_MEMORY:
        return None
    done.check_returncode()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def fit_layers(arguments: argparse.Namespace, precision: str) -> None:
    """Reduce `--layers` until both loops fit in memory, in the precision that needs most."""
    while arguments.layers > 0:
        if all(call(arguments, which, precision) is not None for which in ("ours", "bare")):
            return
        print(f"{arguments.layers} layers do not fit", file=sys.stderr)
        arguments.layers -= 1
    sys.exit("one layer does not fit on this GPU; choose a smaller --micro")


def summarize(run: RunConfig, rounds: list[dict[str, Any]], peak: float | None, ceiling: float) -> dict[str, Any]:
    """Return speed figures from the median step of all rounds."""
    seconds = statistics.median(second for one in rounds for second in one["seconds"])
    flops = flops_per_token(run.model, run.seq_length)
    tokens = run.tokens_per_step / seconds
    achieved = tokens * flops.full
    return {
        "seconds_a_step": round(seconds, 5),
        "tokens_per_second": round(tokens, 1),
        "tflops_full": round(achieved / 1e12, 2),
        "tflops_causal": round(tokens * flops.causal / 1e12, 2),
        "mfu": round(achieved / peak, 4) if peak else None,
        "of_ceiling": round(achieved / 1e12 / ceiling, 4),
        "peak_gib": round(max(one["peak_gib"] for one in rounds), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--child", choices=["ours", "bare", "ceiling"])
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments)

    from megatron_cpt.model.capabilities import read_machine

    here = read_machine()
    if here.device is None and not arguments.rehearse:
        sys.exit("this benchmark needs a CUDA device (--rehearse runs its code without one, and writes nothing)")
    has_fp8 = here.transformer_engine is not None and here.capability >= (8, 9)
    precisions = list(PRECISIONS) if has_fp8 else ["bf16"]
    probe = argparse.Namespace(**{**vars(arguments), "steps": 1})
    fit_layers(probe, precisions[-1])  # FP8 needs most memory: it keeps copies of the weights
    arguments.layers = probe.layers
    timed: dict[str, list[dict[str, Any]]] = {
        f"{which} {name}": [] for name in precisions for which in ("ours", "bare")
    }
    reached: list[dict[str, float]] = []
    for number in range(1, arguments.rounds + 1):
        reached.append(call(arguments, "ceiling") or {})
        for key, rounds in timed.items():
            which, _, precision = key.partition(" ")
            one = call(arguments, which, precision)
            assert one is not None, "fit_layers measured that it fits"
            rounds.append(one)
        print(f"after round {number} of {arguments.rounds}, {arguments.layers} layers:")
        best = {name: max(one[name] for one in reached) for name in reached[0]}
        report(arguments, str(here), timed, best)
    return 0


def report(arguments: argparse.Namespace, here: str, timed: dict[str, Any], best: dict[str, float]) -> None:
    """Print the results; write them to a file unless this is a rehearsal."""
    gpu = next((gpu for gpu in GPUS.values() if gpu.name.upper() in here.split(" (")[0].upper()), None)
    results = {}
    for key, rounds in timed.items():
        precision = key.partition(" ")[2]
        run = run_config(arguments, precision)
        ceiling = best["fp8" if precision.startswith("fp8") else "bf16"]
        results[key] = summarize(run, rounds, gpu.bf16 if gpu else None, ceiling)
        print(f"{key:22s} {results[key]}")
    best = {name: round(value, 2) for name, value in best.items()}
    print(f"ceiling, TFLOP/s: {best}")
    if not arguments.rehearse:
        num_rounds = len(next(iter(timed.values())))
        shape = {"layers": arguments.layers, "micro_batch": arguments.micro, "rounds": num_rounds, **WIDTH}
        content = {"device": here, "shape": shape, "ceiling_tflops": best, "results": results, "machine": machine()}
        write_result("gpu_blocks", {"convention": __doc__.partition("Convention: ")[2].strip(), **content})


if __name__ == "__main__":
    sys.exit(main())
