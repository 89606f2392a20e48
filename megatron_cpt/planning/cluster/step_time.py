"""Time of a training step on a cluster, estimated from shapes, published hardware figures and three fitted constants.

With m micro-batches, stages of t seconds per micro-batch (`stage_time.py`) and v model chunks per rank, a step takes

    m t_max + (sum(t) - t_max) / v + teacher + exposed gradient exchange + optimizer + scale

(Narayanan et al., arXiv 2104.04473, extended to unequal stages: with a large vocabulary the stage of the head is the
slowest). Example: 4 stages of 1, 1, 1 and 1.2 s, m = 8, v = 2 take 8 x 1.2 + 3 / 2 = 11.1 s. With chunks of unequal
depth (`pipeline_layout`) the passes are simulated instead (`pipeline_schedule.py`).

`Overlap` tells which communication runs beside computation. `benchmarks/adviser_accuracy.py` compares the estimate with
all published figures known to us; docs/internals/adviser.md shows the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.config.knobs import GPU_CLUSTER, is_possible, resolve_speed
from megatron_cpt.planning.cluster.communication import GRADIENT_BYTES, GradientExchange, Links
from megatron_cpt.planning.cluster.pipeline_schedule import balanced_layout, schedule_seconds
from megatron_cpt.planning.cluster.stage_time import HBM_EFFICIENCY, StageTime, stage_time
from megatron_cpt.planning.cost.activations import tokens_of_micro_batch
from megatron_cpt.planning.cost.memory import stage_parameters
from megatron_cpt.planning.cost.rank_layout import Layout, stage_chunks
from megatron_cpt.planning.cost.teacher_cost import LOSS_BYTES, distilled_share, teacher_run
from megatron_cpt.planning.hardware import Gpu

# Seconds that each doubling of the number of nodes adds to a step: more hops, and ranks that wait for the slowest.
# Fitted: the same 15B in bf16 takes 2.66 s on 2 nodes and 2.78 s on 256, 7 doublings (same source as `stage_time.py`).
SECONDS_PER_DOUBLING = 0.0185


@dataclass(frozen=True)
class Overlap:
    """Communication that runs beside computation.

    Attributes:
        tensor: tensor-parallel collectives beside their matrix products (Transformer Engine's user buffers).
        gradients: the reduction of gradients beside the last backward pass.
        weights: the gathering of weights beside the first forward pass.
        gradient_bytes: bytes per reduced gradient.
    """

    tensor: bool = True
    gradients: bool = True
    weights: bool = True
    gradient_bytes: int = GRADIENT_BYTES

    @classmethod
    def of(cls, config: RunConfig) -> Overlap:
        """Return the overlap that the run's own options below `speed` give on GPUs."""
        on = resolve_speed(config, GPU_CLUSTER)[0]
        return cls("tp_comm_overlap" in on, "overlap_grad_reduce" in on, "overlap_param_gather" in on)


def with_tensor_overlap(config: RunConfig) -> RunConfig:
    """Return the run with `speed.tp_comm_overlap` on if that is possible and the run does not set it to false."""
    requested = config.speed.tp_comm_overlap
    if requested is False:
        return config
    possible = is_possible("tp_comm_overlap", config, GPU_CLUSTER)
    overlap = True if possible else False if requested else None
    if overlap is requested:
        return config
    return config.model_copy(update={"speed": config.speed.model_copy(update={"tp_comm_overlap": overlap})})


@dataclass(frozen=True)
class Speed:
    """Time of a step by part, in seconds per GPU, averaged over unequal pipeline stages.

    Attributes:
        step: the whole step, the sum of the parts below.
        matmul: matrix products of all micro-batches.
        attention: core attention.
        memory_bound: all other kernels, and casts to FP8.
        recompute: repeated forward passes.
        communication: exposed tensor, context and pipeline parallelism.
        uneven: waiting for the slowest stage, in every micro-batch.
        bubble: waiting for the first micro-batches to arrive and the last ones to leave.
        teacher: forward passes of a teacher, and the loss that compares with it; 0 without distillation.
        exchange: exposed exchange of gradients and weights.
        optimizer: the update.
        scale: growth with the number of nodes.
        tokens_per_gpu: tokens per second and GPU.
    """

    step: float
    matmul: float
    attention: float
    memory_bound: float
    recompute: float
    communication: float
    uneven: float
    bubble: float
    teacher: float
    exchange: float
    optimizer: float
    scale: float
    tokens_per_gpu: float


def estimate_speed(config: RunConfig, layout: Layout, gpu: Gpu, overlap: Overlap | None = None) -> Speed:
    """Estimate the time of a step and its parts; `overlap=None` follows the run's `speed`."""
    overlap = overlap or Overlap.of(config)
    links = Links.build(config, layout, gpu)
    num_stages, num_micro_batches = config.parallel.pipeline, layout.num_micro_batches
    times = _stage_times(config, layout, gpu, overlap)
    slowest = max(range(num_stages), key=lambda stage: times[stage].total)
    longest = times[slowest].total
    bubble = (sum(time.total for time in times) - longest) / config.parallel.virtual_pipeline

    parts = ("matmul", "attention", "memory_bound", "recompute", "communication", "total")
    means = {part: num_micro_batches * sum(getattr(time, part) for time in times) / num_stages for part in parts}
    exchange = _exposed_exchange(config, layout, links, overlap, slowest, longest)
    optimizer = _optimizer_seconds(config, layout, gpu, slowest)
    scale = SECONDS_PER_DOUBLING * math.log2(max(1.0, layout.num_gpus / gpu.gpus_per_node))
    passes = num_micro_batches * longest + bubble
    if config.parallel.pipeline_layout is not None and config.parallel.virtual_pipeline > 1:
        passes = schedule_seconds([time.chunks for time in times], num_micro_batches)
    teacher = _teacher_seconds(config, layout, gpu)
    step = passes + teacher + exchange + optimizer + scale
    return Speed(
        step=step,
        uneven=passes - bubble - means.pop("total"),
        bubble=bubble,
        teacher=teacher,
        exchange=exchange,
        optimizer=optimizer,
        scale=scale,
        tokens_per_gpu=config.batch.global_ * config.seq_length / step / layout.num_gpus,
        **means,
    )


def _teacher_seconds(config: RunConfig, layout: Layout, gpu: Gpu) -> float:
    """Return seconds of the teacher's forward passes, which precede the student's passes, and of the distilled loss."""
    if config.teacher is None:
        return 0.0
    logits = tokens_of_micro_batch(config) * config.model.padded_vocab / config.parallel.tensor
    micro_batches = distilled_share(config) * layout.num_micro_batches
    seconds = micro_batches * LOSS_BYTES * logits / (HBM_EFFICIENCY * gpu.hbm)
    if (run := teacher_run(config)) is not None:
        stages = [time.forward for time in _stage_times(run, layout, gpu, Overlap(tensor=False))]
        seconds += micro_batches * max(stages) + (sum(stages) - max(stages)) / config.parallel.virtual_pipeline
    return seconds


def _stage_times(config: RunConfig, layout: Layout, gpu: Gpu, overlap: Overlap) -> list[StageTime]:
    links, stages = Links.build(config, layout, gpu), range(config.parallel.pipeline)
    return [stage_time(config, layout, gpu, links, stage, overlaps_tensor=overlap.tensor) for stage in stages]


def with_balanced_stages(config: RunConfig, layout: Layout, gpu: Gpu) -> RunConfig:
    """Return the run with the `parallel.pipeline_layout` whose stages take about equally long."""
    parallel, num_layers = config.parallel, config.model.layers
    even = config.model_copy(update={"parallel": parallel.model_copy(update={"pipeline_layout": None})})
    times = _stage_times(even, layout, gpu, Overlap.of(even))
    chunk = len(stage_chunks(even, 0)[0])
    layer = times[0].chunks[0] / chunk
    head = times[-1].chunks[-1] / layer - chunk
    balanced = balanced_layout(num_layers, parallel.pipeline, parallel.virtual_pipeline, head)
    return config.model_copy(update={"parallel": parallel.model_copy(update={"pipeline_layout": balanced})})


def _exposed_exchange(
    config: RunConfig, layout: Layout, links: Links, overlap: Overlap, stage: int, micro_batch: float
) -> float:
    """Return seconds of gradients that the last backward pass, and weights that the first forward pass, do not hide."""
    exchange = GradientExchange.build(config, layout, links, stage, gradient_bytes=overlap.gradient_bytes)
    hidden_reduce = micro_batch * 2 / 3 if overlap.gradients else 0.0
    hidden_gather = micro_batch / 3 if overlap.weights else 0.0
    return max(0.0, exchange.reduce - hidden_reduce) + max(0.0, exchange.gather - hidden_gather)


def _optimizer_seconds(config: RunConfig, layout: Layout, gpu: Gpu, stage: int) -> float:
    """Return seconds of the update, by bytes per parameter.

    The norm reads the gradient (4). Adam reads gradient, master weight and two moments (16) and writes all but the
    gradient, and the weight in bf16 (14). Moments in bf16 are copied to fp32 before (4 + 8) and back after (8 + 4).
    Then the gradients of all parameters, not only of the shard, are cleared (4).
    """
    copies = 4 + 8 + 8 + 4 if config.optimizer.moments == "bf16" else 0
    parameters = shard = stage_parameters(config, stage)
    if config.parallel.distributed_optimizer:
        shard = parameters / (layout.data_parallel * config.parallel.context)
    return ((4 + 16 + 14 + copies) * shard + 4 * parameters) / (HBM_EFFICIENCY * gpu.hbm)
