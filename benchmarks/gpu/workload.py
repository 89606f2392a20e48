"""Runs that the GPU measurements share: shapes, data, and this project's trainer under a clock."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.measured import Report
from megatron_cpt.config import ModelConfig, RunConfig, draft_config
from megatron_cpt.config.schema import CheckpointConfig
from megatron_cpt.data import IndexedDatasetWriter
from megatron_cpt.hooks import Hook
from megatron_cpt.planning.cluster.estimate import Cluster, place_on_cluster
from megatron_cpt.planning.cost.parameters import flops_per_token
from megatron_cpt.planning.hardware import GPUS, Gpu
from megatron_cpt.prepare import plan_run

WARM_UP = 5  # steps in which kernels compile and the allocator grows
STACK = {
    # One of two tensor-parallel ranks of Nemotron-4 15B has half of the heads and half of the MLP. 8 of the 32 layers
    # fill the memory; the vocabulary is small, because embedding and head with their optimizer state would, too.
    "preset": "nemotron4_15b",
    "layers": 8,
    "heads": 24,
    "kv_groups": 4,
    "ffn_hidden": 12_288,
    "vocab": 16_384,
}
ONE_BILLION = {
    "layers": 22,
    "hidden": 2048,
    "ffn_hidden": 8192,
    "heads": 16,
    "kv_groups": 4,
    "vocab": 32_000,
    "rotary_percent": 0.5,
    "norm": "layernorm1p",
    "activation": "squared_relu",
}
TOY = {"preset": "tiny_nemotron", "vocab": 512}


def stack_run(report: Report, precision: dict[str, Any], *, steps: int, **changes: Any) -> dict[str, Any]:
    """Return the run of the 15B's layers: 4 micro-batches of 2 x 4,096 tokens per step."""
    return run_mapping(report, STACK, micro=2, num_micro_batches=4, steps=steps, precision=precision, **changes)


def one_billion_run(report: Report, *, steps: int, **changes: Any) -> dict[str, Any]:
    """Return the run of the 1.1B: 2 micro-batches of 4 x 4,096 tokens per step."""
    precision = {"compute": "bf16"}
    return run_mapping(report, ONE_BILLION, micro=4, num_micro_batches=2, steps=steps, precision=precision, **changes)


def run_mapping(
    report: Report,
    model: dict[str, Any],
    *,
    micro: int,
    num_micro_batches: int,
    steps: int,
    precision: dict[str, Any],
    **changes: Any,
) -> dict[str, Any]:
    """Write a source of tokens and return a run.yaml over it as a mapping, at toy width in a rehearsal."""
    model, length = (TOY, 64) if report.is_rehearsal else (model, 4096)
    batch = micro * num_micro_batches
    prefix = report.work / "tokens"
    if not prefix.with_suffix(".bin").exists():
        write_tokens(prefix, vocab=model["vocab"], num_tokens=(steps + 1) * batch * (length + 1))
    return {
        "name": "measured",
        "output": str(report.work / "run"),
        "model": model,
        "seq_length": length,
        "batch": {"global": batch, "micro": micro},
        "tokens": steps * batch * length,
        "schedule": {"max_lr": 1e-5},
        "sources": {"tokens": {"path": str(prefix)}},
        "phases": [{"name": "only", "blend": {"tokens": 1.0}}],
        "precision": precision,
        "checkpoint": without_final_save(),
        **changes,
    }


def without_final_save() -> dict[str, Any]:
    """Return a checkpoint section that saves nothing, where `checkpoint.at_end` exists."""
    return {"at_end": False} if "at_end" in CheckpointConfig.model_fields else {}


def write_tokens(prefix: Path, *, vocab: int, num_tokens: int) -> None:
    """Write a document in which each id is the previous id plus a small random step, which a model can learn."""
    rng = np.random.default_rng(0)
    ids = np.cumsum(rng.integers(1, 5, size=num_tokens)) % vocab
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        writer.add_document(ids.astype(np.uint16))


def config_of(run: dict[str, Any]) -> RunConfig:
    """Return the validated run."""
    return draft_config(run).finish("measured run")


def random_batches(run: RunConfig) -> list[Any]:
    """Return the micro-batches of one step for loops without a loader."""
    from megatron_cpt.data.loading.batch import make_batch

    rng = np.random.default_rng(0)
    shape = (run.batch.global_ // run.batch.micro, run.batch.micro, run.seq_length + 1)
    return [make_batch(list(micro), [0] * run.batch.micro) for micro in rng.integers(0, run.model.vocab, shape)]


class StepClock(Hook):
    """Times at which steps ended. A step ends when its results are on the host, so no synchronization is added."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_start(self, session: Any) -> None:
        """Note the start of the first step."""
        self.times.append(time.perf_counter())

    def on_step(self, session: Any) -> None:
        """Note the end of a step."""
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [end - start for start, end in pairwise(self.times)]


def train(run: RunConfig, hooks: Sequence[Hook]) -> None:
    """Train a run with this project's trainer."""
    from megatron_cpt.train.trainer import Trainer

    with Trainer(run, hooks=hooks) as trainer:
        trainer.fit()


def draw_weights_on_device() -> None:
    """Replace the initialization that is equal in every layout: it draws billions of weights on the CPU."""
    import torch

    from megatron_cpt.model import build_model

    def draw(chunks: Any, model: ModelConfig, seed: int) -> None:
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parameter.dim() == 2:
                    torch.nn.init.normal_(parameter, std=model.init_std)

    build_model.initialize_weights = draw


def device_name() -> str:
    """Return the name of the GPU, or `CPU`."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def known_gpu() -> Gpu | None:
    """Return the published figures of this machine's GPU; None if they are unknown."""
    words = re.findall(r"[a-z0-9]+", device_name().lower())
    return next((GPUS[word] for word in words if word in GPUS), None)


def adviser_estimate(run: RunConfig) -> Cluster | None:
    """Return what this project's planner expects of the run on one GPU of this kind."""
    gpu = known_gpu()
    return None if gpu is None else place_on_cluster(run, plan_run(run), gpu, 1)


def report_speed(report: Report, run: RunConfig, seconds: Sequence[float]) -> None:
    """Report the time of a step with tokens/s, TFLOP/s, MFU and the adviser's estimate."""
    flops = flops_per_token(run.model, run.seq_length)
    rates = [run.tokens_per_step / each for each in seconds]
    report.repeated("step_seconds", seconds)
    report.repeated("tokens_per_second", rates)
    report.repeated("tflops", [rate * flops.full / 1e12 for rate in rates])
    report.repeated("tflops_causal", [rate * flops.causal / 1e12 for rate in rates])
    gpu, estimate = known_gpu(), adviser_estimate(run)
    if gpu is not None and estimate is not None:
        report.repeated("mfu", [rate * flops.full / gpu.bf16 for rate in rates])
        report.note(adviser_step_seconds=estimate.speed.step)
        report.repeated("step_over_adviser", [each / estimate.speed.step for each in seconds])
