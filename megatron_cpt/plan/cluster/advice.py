"""What the adviser hands back: layouts with what they would give, and what keeps the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpt.config import RunConfig
from megatron_cpt.config.knobs import GPU_CLUSTER, resolve_speed
from megatron_cpt.plan.cluster.estimate import MEMORY_MARGIN
from megatron_cpt.plan.cluster.step_time import Speed
from megatron_cpt.plan.cost.memory import GIB, Memory
from megatron_cpt.plan.cost.rank_layout import Layout
from megatron_cpt.plan.hardware import Gpu
from megatron_cpt.plan.timeline.segments import Segment


@dataclass(frozen=True)
class Candidate:
    """One layout with what it would give.

    Attributes:
        config: the run in this layout.
        layout: the same on the GPUs.
        memory: of the pipeline stage that needs most, in the steps that need most.
        speed: of the steps that most tokens are trained in.
        plain: the same without `speed.tp_comm_overlap`; None where it is off.
        why: one line.
    """

    config: RunConfig
    layout: Layout
    memory: Memory
    speed: Speed
    plain: Speed | None
    why: str

    @property
    def split(self) -> str:
        """TP, PP and CP, as people write them."""
        return split_name(self.config)

    @property
    def overrides(self) -> list[str]:
        """What to write behind `megatron-cpt train RUN.yaml` to get it."""
        parallel = self.config.parallel
        keys = ("tensor", "pipeline", "virtual_pipeline", "context", "sequence", "distributed_optimizer")
        values = {f"parallel.{key}": getattr(parallel, key) for key in keys}
        recompute = self.config.recompute
        values |= {"batch.micro": self.config.batch.micro, "recompute.granularity": recompute.granularity}
        if recompute.granularity == "full":
            values |= {"recompute.method": recompute.method, "recompute.num_layers": recompute.num_layers}
        if self.config.speed.tp_comm_overlap is not None:
            values["speed.tp_comm_overlap"] = self.config.speed.tp_comm_overlap
        return [f"{key}={str(value).lower()}" for key, value in values.items()]

    @property
    def knobs(self) -> frozenset[str]:
        """What of `speed` is on."""
        return resolve_speed(self.config, GPU_CLUSTER)[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `plan --advise --json`."""
        parallel = self.config.parallel
        return {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "context": parallel.context,
            "micro_batch": self.config.batch.micro,
            "recompute": self.config.recompute.granularity,
            "data_parallel": self.layout.data_parallel,
            "num_micro_batches": self.layout.num_micro_batches,
            "global_batch": self.config.batch.global_,
            "tokens_per_second_per_gpu": self.speed.tokens_per_gpu,
            "tokens_per_second_per_gpu_without_tp_comm_overlap": self.plain.tokens_per_gpu if self.plain else None,
            "step_seconds": self.speed.step,
            "memory_per_gpu_gib": self.memory.total / GIB,
            "speed": sorted(self.knobs),
            "why": self.why,
            "overrides": self.overrides,
        }


@dataclass(frozen=True)
class Misfit:
    """A split that cannot run, and what keeps it."""

    split: str
    reason: str


@dataclass(frozen=True)
class Advice:
    """What to run on.

    Attributes:
        gpu: the GPU.
        num_gpus: how many.
        steps: what the speeds are of, by their shape.
        is_uniform: whether all steps of the run have that shape.
        ranking: the best layout of each split that fits, the fastest first.
        current: the run's own layout; None where it does not divide.
        current_overlapped: the same with `speed.tp_comm_overlap`, where the run leaves that open and it is possible.
        current_problem: what keeps the run's own layout from these GPUs; empty where nothing does.
        misfits: splits that do not divide or fit.
        other_batch: the best layout among splits that another global batch would allow; None where none is faster.
        num_tried: layouts that were looked at.
    """

    gpu: Gpu
    num_gpus: int
    steps: Segment
    is_uniform: bool
    ranking: Sequence[Candidate]
    current: Candidate | None
    current_overlapped: Speed | None
    current_problem: str
    misfits: Sequence[Misfit]
    other_batch: Candidate | None
    num_tried: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `plan --advise --json`."""
        return {
            "gpu": self.gpu.name,
            "num_gpus": self.num_gpus,
            "memory_gib": self.gpu.memory_gib,
            "memory_margin": MEMORY_MARGIN,
            "is_calibrated": self.gpu.is_calibrated,
            "speed_of": {"global_batch": self.steps.global_batch, "seq_length": self.steps.seq_length},
            "ranking": [candidate.to_dict() for candidate in self.ranking],
            "current": self.current.to_dict() if self.current else None,
            "current_problem": self.current_problem,
            "misfits": [{"split": misfit.split, "reason": misfit.reason} for misfit in self.misfits],
            "other_batch": self.other_batch.to_dict() if self.other_batch else None,
            "num_tried": self.num_tried,
        }


def split_name(config: RunConfig) -> str:
    """TP, PP and CP, as people write them."""
    parallel = config.parallel
    return f"TP{parallel.tensor} PP{parallel.pipeline}" + (f" CP{parallel.context}" if parallel.context > 1 else "")
