"""Memory, speed and time of a run on a cluster of named GPUs, for its own layout or a candidate of the adviser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_cpt.config import RunConfig
from megatron_cpt.config.checks import CHECKS
from megatron_cpt.config.knobs import GPU_CLUSTER, resolve_speed
from megatron_cpt.errors import UserError
from megatron_cpt.planning.cluster.step_time import (
    Overlap,
    Speed,
    estimate_speed,
    with_balanced_stages,
    with_tensor_overlap,
)
from megatron_cpt.planning.cost.activations import default_spec
from megatron_cpt.planning.cost.formats import format_of
from megatron_cpt.planning.cost.memory import GIB, Memory
from megatron_cpt.planning.cost.parameters import FlopsPerToken, flops_per_token
from megatron_cpt.planning.cost.rank_layout import Layout, layout_problems
from megatron_cpt.planning.hardware import GPUS, Gpu
from megatron_cpt.planning.run_plan import RunPlan, peak_memories, with_shape
from megatron_cpt.planning.timeline.phases import batch_problems
from megatron_cpt.planning.timeline.segments import Segment

# Share of the memory that a layout should leave free, for fragmentation and errors of the estimate.
MEMORY_MARGIN = 0.08
# Smallest loss of time for which a plan proposes stages of other depths.
MIN_HINT = 0.03


@dataclass(frozen=True)
class Cluster:
    """Estimate for a run on a cluster.

    Attributes:
        stages: memory of every pipeline stage, in the steps that need most.
        speed: in the steps that train most tokens.
        overlapped: speed with `speed.tp_comm_overlap`; None if the run sets that or it is not possible.
        knobs: names of the options below `speed` that are on.
        flops: of training on one token, in the steps of `speed`.
        seconds: of all steps of the run.
        peak: FLOP/s of the GPU in the format of the matrix products (bf16 or FP8), of which MFU is a share.
        hints: settings that would make the run faster, with the expected gain.
    """

    gpu: Gpu
    layout: Layout
    stages: Sequence[Memory]
    speed: Speed
    overlapped: Speed | None
    knobs: frozenset[str]
    flops: FlopsPerToken
    seconds: float
    peak: float
    hints: Sequence[str]

    @property
    def memory(self) -> Memory:
        """Memory of the stage that needs most."""
        return max(self.stages, key=lambda memory: memory.total)

    @property
    def gpu_hours(self) -> float:
        """Hours of the run times the number of GPUs."""
        return self.seconds / 3600 * self.layout.num_gpus

    def mfu(self, flops: float) -> float:
        """Return the model FLOPs utilization for `flops` operations per token."""
        return self.speed.tokens_per_gpu * flops / self.peak

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `plan --json`."""
        return {
            "gpu": asdict(self.gpu),
            "num_gpus": self.layout.num_gpus,
            "memory_by_stage_gib": [{**stage.to_dict(), "total": stage.total / GIB} for stage in self.stages],
            "memory_per_gpu_gib": self.memory.total / GIB,
            "fits": fits(self.memory, self.gpu),
            "tokens_per_second_per_gpu": self.speed.tokens_per_gpu,
            "tokens_per_second_per_gpu_with_tp_comm_overlap": self.overlapped and self.overlapped.tokens_per_gpu,
            "speed": sorted(self.knobs),
            "step_seconds": self.speed.step,
            "step_seconds_by_part": {
                name: value for name, value in asdict(self.speed).items() if name not in ("step", "tokens_per_gpu")
            },
            "mfu": {kind: self.mfu(flops) for kind, flops in asdict(self.flops).items()},
            "mfu_peak_flops": self.peak,
            "days": self.seconds / 86400,
            "gpu_hours": self.gpu_hours,
            "hints": list(self.hints),
        }


def find_gpu(name: str, config: RunConfig) -> Gpu:
    """Return the GPU with a name.

    Raises:
        UserError: if the name is unknown, or the planner has no figures for the run's precision on this GPU.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise UserError(f"--gpu {name}: not a known GPU; choose one of {', '.join(GPUS)}")
    if config.precision.fp4 is not None:
        raise UserError(
            "precision.fp4: this planner has no figures for FP4; plan with "
            "precision.fp4=null and precision.fp8={recipe: mxfp8}, which is slower"
        )
    if format_of(config) is not None and gpu.fp8 is None:
        raise UserError(f"precision.fp8: {gpu.title} has no FP8; set precision.fp8=null or choose another GPU")
    return gpu


def fits(memory: Memory, gpu: Gpu) -> bool:
    """Return True if a stage leaves the memory margin free."""
    return memory.total <= (1 - MEMORY_MARGIN) * gpu.memory_gib * GIB


def largest_segment(plan: RunPlan) -> Segment:
    """Return the first segment whose shape (batch, micro-batch, sequence length) trains most tokens."""
    tokens = Counter[tuple[int, int, int]]()
    for segment in plan.segments:
        tokens[segment.shape] += segment.end.tokens - segment.first_token
    ((most, _),) = tokens.most_common(1)
    return next(segment for segment in plan.segments if segment.shape == most)


def place_on_cluster(config: RunConfig, plan: RunPlan, gpu: Gpu, num_gpus: int | None) -> Cluster:
    """Estimate a planned run on GPUs; `num_gpus=None` means one replica of the model."""
    runs = {segment.shape: with_shape(config, segment) for segment in plan.segments}
    layouts = {shape: Layout.build(run, num_gpus) for shape, run in runs.items()}
    speeds = {shape: estimate_speed(run, layouts[shape], gpu) for shape, run in runs.items()}
    most = largest_segment(plan)
    return Cluster(
        gpu=gpu,
        layout=layouts[most.shape],
        stages=peak_memories(config, plan.segments, num_gpus, gpu),
        speed=speeds[most.shape],
        overlapped=overlapped_speed(config, plan, gpu, num_gpus),
        knobs=resolve_speed(config, GPU_CLUSTER)[0],
        flops=flops_per_token(config.model, most.seq_length),
        seconds=sum(speeds[segment.shape].step * segment.num_steps for segment in plan.segments),
        peak=gpu.fp8 if format_of(config) is not None and gpu.fp8 is not None else gpu.bf16,
        hints=tuple(_hints(config, plan, gpu, num_gpus, speeds[most.shape])),
    )


def _hints(config: RunConfig, plan: RunPlan, gpu: Gpu, num_gpus: int | None, speed: Speed) -> Iterator[str]:
    if config.recompute.granularity == "selective" and default_spec(config) == "te":
        yield (
            f"recompute.granularity=none saves about {speed.recompute / speed.step:.1%} of a step; fused attention "
            "keeps no scores, so selective recomputation frees almost no memory"
        )
    if speed.uneven < MIN_HINT * speed.step:
        return
    run = with_shape(config, largest_segment(plan))
    layout = Layout.build(run, num_gpus)
    chosen = with_balanced_stages(run, layout, gpu).parallel.pipeline_layout
    balanced = config.model_copy(update={"parallel": config.parallel.model_copy(update={"pipeline_layout": chosen})})
    if candidate_problems(balanced, plan, layout.num_gpus):
        return
    faster = estimate_speed(with_shape(balanced, largest_segment(plan)), layout, gpu)
    memory = max(peak_memories(balanced, plan.segments, num_gpus, gpu), key=lambda memory: memory.total)
    gain = faster.tokens_per_gpu / speed.tokens_per_gpu - 1
    if gain >= MIN_HINT and fits(memory, gpu):
        yield (
            f"the slowest pipeline stage costs {speed.uneven / speed.step:.1%} of a step; "
            f"parallel.pipeline_layout={_layout_text(chosen)} gives about {faster.tokens_per_gpu:,.0f} tokens/s/GPU "
            f"({gain:+.0%}) with {memory.total / GIB:.1f} GiB"
        )


def overlapped_speed(config: RunConfig, plan: RunPlan, gpu: Gpu, num_gpus: int | None) -> Speed | None:
    """Return the speed with `speed.tp_comm_overlap`; None if the run sets that or it is not possible."""
    with_overlap = with_tensor_overlap(config)
    if config.speed.tp_comm_overlap is not None or with_overlap is config:
        return None
    run = with_shape(with_overlap, largest_segment(plan))
    return estimate_speed(run, Layout.build(run, num_gpus), gpu)


def step_lines(speed: Speed) -> list[tuple[str, float]]:
    """Return the parts of a step with their shares, the largest first."""
    names = {
        "matmul": "matrix products",
        "attention": "attention",
        "memory_bound": "memory-bound kernels",
        "recompute": "recomputation",
        "communication": "TP/CP/PP communication",
        "uneven": "slowest stage",
        "bubble": "bubble",
        "teacher": "teacher",
        "exchange": "gradient exchange",
        "optimizer": "optimizer",
        "scale": "scale",
    }
    shares = {text: getattr(speed, name) / speed.step for name, text in names.items()}
    return sorted(shares.items(), key=lambda item: -item[1])


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
        if "pipeline_layout" in parallel.model_fields_set:
            values["parallel.pipeline_layout"] = _layout_text(parallel.pipeline_layout)
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
            "pipeline_layout": parallel.pipeline_layout,
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


def _layout_text(layout: Sequence[int] | None) -> str:
    return "null" if layout is None else f"[{','.join(map(str, layout))}]"


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
