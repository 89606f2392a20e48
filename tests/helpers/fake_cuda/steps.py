"""Training steps of one rank of a large layout on the fake device."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from tests.helpers.fake_cuda import device
from tests.helpers.fake_cuda.kernels import compiler_for
from tests.helpers.fake_cuda.mode import FakeCuda

RUN = {
    "name": "fake",
    "output": "runs/fake",
    "model": {"preset": "nemotron4_15b"},
    "seq_length": 4096,
    "batch": {"global": 1152, "micro": 1},
    "tokens": 1152 * 4096,
    "schedule": {"max_lr": 4.5e-5},
    "sources": {"web": {"path": "data/web"}, "code": {"path": "data/code"}},
    "phases": [{"name": "only", "blend": {"web": 0.5, "code": 0.5}}],
    "parallel": {"tensor": 8, "pipeline": 4, "sequence": True, "distributed_optimizer": True},
    "precision": {"compute": "bf16"},
}


@dataclass(frozen=True)
class Case:
    """One rank of a job.

    Attributes:
        rank, world_size: of the job.
        overrides: changes of `RUN`.
        micro_batches: of this rank per step; the global batch follows from it.
        explains: the report says which operators created the memory of the peak.
    """

    rank: int
    world_size: int
    overrides: list[str] = field(default_factory=list)
    micro_batches: int = 8
    explains: bool = False


_mode: FakeCuda | None = None


def _install() -> FakeCuda:
    global _mode
    if _mode is None:
        _mode = FakeCuda()
        device.install(_mode.note, compiler_for(_mode.memory))
    return _mode


def run_case(case: Case) -> dict[str, Any]:
    """Train two steps and return the waits, casts and memory of the second one."""
    mode = _install()
    from megatron_cpt.backend import process_groups
    from megatron_cpt.config import draft_config

    draft = draft_config(dict(RUN), case.overrides)
    assert draft.config is not None, draft.problems
    replicas = case.world_size // draft.config.parallel.model_parallel_size
    size = case.micro_batches * draft.config.batch.micro * replicas
    run = draft_config(dict(RUN), [*case.overrides, f"batch.global={size}", f"tokens={size * 4096}"]).finish("fake")
    with device.process_group(case.rank, case.world_size), mode, process_groups(run.parallel) as ranks:
        report = _train(case, run, ranks, mode)
    gc.collect()
    mode.memory.forget()
    return report


def _train(case: Case, run: Any, ranks: Any, mode: FakeCuda) -> dict[str, Any]:
    from megatron_cpt.backend import seed_everything
    from megatron_cpt.data import StepData
    from megatron_cpt.data.loading.batch import make_batch
    from megatron_cpt.model.build_model import build_model
    from megatron_cpt.optim.build_optimizer import build_optimizer
    from megatron_cpt.optim.update import Update
    from megatron_cpt.train.forward import ForwardPass
    from megatron_cpt.train.step import train_step

    seed_everything(run.seed, pipeline_rank=ranks.pipeline_rank)
    model = build_model(run, draw_weights=False)
    optimizer = build_optimizer(run.optimizer, run.parallel, run.precision, model.chunks)
    forward = ForwardPass(model, len(run.sources), run.parallel.context, ranks.device)
    update = Update(optimizer, run.optimizer.weight_decay)
    random = np.random.default_rng(0)
    samples = random.integers(0, 1000, (run.batch.micro, run.seq_length + 1))
    batches = [make_batch(samples, [0] * run.batch.micro) for _ in range(case.micro_batches)]
    for _ in range(2):
        mode.waits.clear()
        mode.casts.clear()
        gc.collect()
        mode.memory.explains = case.explains
        mode.memory.reset_peak()
        before = mode.memory.now
        train_step(
            forward,
            update,
            StepData(batches, 1, {}, {}),
            1e-5,
            contributes_loss=True,
            requests=lambda: [False],
            judge=lambda *_: None,
            before_update=lambda: None,
        )
    left = mode.memory.now
    gc.collect()
    parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
    return {
        "case": asdict(case),
        "layers": model.layers,
        "knobs": sorted(model.knobs),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "devices": sorted({str(parameter.device) for parameter in parameters}),
        "waits": [asdict(wait) for wait in mode.waits],
        "casts": Counter(f"{cast.kind} at {cast.place}" for cast in mode.casts),
        "memory": {"peak": mode.memory.peak, "before": before, "after": left, "collected": mode.memory.now},
        "at_peak": mode.memory.at_peak.most_common(20),
    }
