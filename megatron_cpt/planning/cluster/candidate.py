"""One layout of a run on given GPUs: its memory and speed, or the reasons why it cannot run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_cpt.config import RunConfig
from megatron_cpt.config.checks import CHECKS
from megatron_cpt.config.knobs import GPU_CLUSTER, resolve_speed
from megatron_cpt.planning.cluster.estimate import MEMORY_MARGIN, largest_segment, step_lines
from megatron_cpt.planning.cluster.step_time import Overlap, Speed, estimate_speed
from megatron_cpt.planning.cost.memory import GIB, Memory
from megatron_cpt.planning.cost.rank_layout import Layout, layout_problems
from megatron_cpt.planning.hardware import Gpu
from megatron_cpt.planning.run_plan import RunPlan, peak_memories, with_shape
from megatron_cpt.planning.timeline.phases import batch_problems


@dataclass(frozen=True)
class Candidate:
    """Estimate for one layout.

    Attributes:
        memory: of the pipeline stage that needs most, in the steps that need most.
        speed: in the steps that train most tokens.
        plain: speed without `speed.tp_comm_overlap`; None if that is off anyway.
    """

    config: RunConfig
    layout: Layout
    memory: Memory
    speed: Speed
    plain: Speed | None
    why: str

    @classmethod
    def build(cls, config: RunConfig, plan: RunPlan, num_gpus: int, gpu: Gpu) -> Candidate:
        """Estimate the layout of a run whose steps are planned."""
        run = with_shape(config, largest_segment(plan))
        layout, overlap = Layout.build(run, num_gpus), Overlap.of(config)
        speed = estimate_speed(run, layout, gpu)
        plain = estimate_speed(run, layout, gpu, replace(overlap, tensor=False)) if overlap.tensor else None
        memory = max(peak_memories(config, plan.segments, num_gpus, gpu), key=lambda memory: memory.total)
        return cls(config, layout, memory, speed, plain, _explain(speed))

    @property
    def split(self) -> str:
        """Sizes of tensor, pipeline and context parallelism, such as `TP2 PP4`."""
        return split_name(self.config)

    @property
    def overrides(self) -> list[str]:
        """Arguments of `megatron-cpt train RUN.yaml` that select this layout."""
        parallel, recompute = self.config.parallel, self.config.recompute
        keys = ("tensor", "pipeline", "virtual_pipeline", "context", "sequence", "distributed_optimizer")
        values = {f"parallel.{key}": getattr(parallel, key) for key in keys}
        values |= {"batch.micro": self.config.batch.micro, "recompute.granularity": recompute.granularity}
        if recompute.granularity == "full":
            values |= {"recompute.method": recompute.method, "recompute.num_layers": recompute.num_layers}
        if self.config.speed.tp_comm_overlap is not None:
            values["speed.tp_comm_overlap"] = self.config.speed.tp_comm_overlap
        return [f"{key}={str(value).lower()}" for key, value in values.items()]

    @property
    def knobs(self) -> frozenset[str]:
        """Names of the options below `speed` that are on."""
        return resolve_speed(self.config, GPU_CLUSTER)[0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `plan --advise --json`."""
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
            "tokens_per_second_per_gpu_without_tp_comm_overlap": self.plain and self.plain.tokens_per_gpu,
            "step_seconds": self.speed.step,
            "memory_per_gpu_gib": self.memory.total / GIB,
            "speed": sorted(self.knobs),
            "why": self.why,
            "overrides": self.overrides,
        }


def split_name(config: RunConfig) -> str:
    """Return the sizes of tensor, pipeline and context parallelism, such as `TP2 PP4`."""
    parallel = config.parallel
    return f"TP{parallel.tensor} PP{parallel.pipeline}" + (f" CP{parallel.context}" if parallel.context > 1 else "")


def candidate_problems(config: RunConfig, plan: RunPlan, num_gpus: int) -> list[str]:
    """Return the messages that `train` would give for this layout on these GPUs; none if it can run."""
    found = [text for check in CHECKS for text in check.find(config)]
    launch = (*layout_problems(config, num_gpus), *batch_problems(config, plan.phases, num_gpus))
    return found + [problem.text for problem in launch]


def explain_memory(memory: Memory, gpu: Gpu) -> str:
    """Return why a stage does not fit the GPU."""
    usable = (1 - MEMORY_MARGIN) * gpu.memory_gib
    states = (memory.weights + memory.gradients + memory.optimizer) / GIB
    return (
        f"needs {memory.total / GIB:.0f} GiB on stage {memory.stage} ({states:.0f} of them weights, gradients and "
        f"optimizer), {usable:.0f} are usable"
    )


def _explain(speed: Speed) -> str:
    """Return the share of useful work in a step, and the two largest shares of other parts."""
    shares = dict(step_lines(speed))
    work = shares.pop("matrix products") + shares.pop("attention")
    shares.pop("memory-bound kernels")  # about equal in every layout
    lost = [f"{share:.1%} {name}" for name, share in shares.items() if share >= 0.005][:2]
    return f"{work:.0%} matmul and attention; lost: {', '.join(lost) or 'next to nothing'}"
