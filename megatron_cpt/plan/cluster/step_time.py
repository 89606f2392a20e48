"""How long a step takes on a cluster: an estimate from shapes, published hardware figures and three fitted constants.

A step is `(m - 1) t_max + t_max + (sum of t - t_max) / v` for m micro-batches over stages that need t each, v chunks a
rank (Narayanan et al., arXiv 2104.04473, with stages that differ: the one with the head is the slowest where the
vocabulary is large), and what of the gradients' exchange no backward pass hides, the optimizer, and a little for scale.
A micro-batch on a stage is:

- matrix products: operations over a share of the GPU's peak, plus their operands' way through its memory; in FP8 also
  the casts, and the casts of weights once a step;
- attention: operations over a share of the peak, backward 2.5 times forward (FlashAttention recomputes the scores);
- the rest: bytes through the memory (norms, residuals, activation, RoPE, loss);
- tensor and context parallelism: what their products do not hide.

What communication overlaps follows the run's `speed` (see `Overlap`); kernels are taken to be fused, whatever it says.
Where each constant is from is said beside it; `benchmarks/adviser_accuracy.py` holds the model
against all published figures that we know, and docs/adviser.md shows the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.config.knobs import GPU_CLUSTER, is_possible, resolve_speed
from megatron_cpt.plan.cluster.communication import (
    GRADIENT_BYTES,
    GradientExchange,
    Links,
    context_seconds_a_layer,
    pipeline_seconds,
    tensor_seconds_a_layer,
)
from megatron_cpt.plan.cost.activations import layers_of_stage, tokens_of_micro_batch
from megatron_cpt.plan.cost.formats import format_of, quantized_layers
from megatron_cpt.plan.cost.memory import stage_parameters
from megatron_cpt.plan.cost.parameters import key_value_size, query_size
from megatron_cpt.plan.cost.rank_layout import Layout
from megatron_cpt.plan.hardware import Gpu

# Share of the dense peak that large matrix products reach inside a training run, clocks as the power limit allows.
# Fitted: Nemotron-4 15B on 16 H100, bf16 6,159 and FP8 8,275 tokens/s/GPU (NVIDIA dgxc-benchmarking v25.04).
BF16_EFFICIENCY = 0.712
FP8_EFFICIENCY = 0.605
# Causal attention with heads of 128, forward and backward together, as a share of the bf16 peak. FlashAttention-3
# reaches 0.6 forward at 4k and 8k (Shah et al., arXiv 2407.08608, figure 5); backward, most of it, is taken as 0.5.
ATTENTION_EFFICIENCY = 0.52
# Share of the memory's peak that simple kernels reach, assumed.
HBM_EFFICIENCY = 0.85
# Each doubling of the number of nodes costs a step this much: latency of more hops, ranks waiting for the slowest.
# Fitted: the same 15B in bf16 needs 2.66 s on 2 nodes and 2.78 s on 256, 7 doublings (same source).
SECONDS_A_DOUBLING = 0.0185


@dataclass(frozen=True)
class Overlap:
    """What runs beside computation.

    Attributes:
        tensor: tensor-parallel communication, in pieces beside its matrix product (Transformer Engine's user buffers).
        gradients: the reduction of gradients beside the last backward pass.
        weights: the gathering of weights beside the first forward pass.
        gradient_bytes: of one gradient as it is reduced.
    """

    tensor: bool = True
    gradients: bool = True
    weights: bool = True
    gradient_bytes: int = GRADIENT_BYTES

    @classmethod
    def of(cls, config: RunConfig) -> Overlap:
        """What the run's own knobs come to on GPUs."""
        on = resolve_speed(config, GPU_CLUSTER)[0]
        return cls("tp_comm_overlap" in on, "overlap_grad_reduce" in on, "overlap_param_gather" in on)


def with_tensor_overlap(config: RunConfig) -> RunConfig:
    """A run with `tp_comm_overlap` if that is possible, unless it says no."""
    said = config.speed.tp_comm_overlap
    if said is False:
        return config
    wanted = True if is_possible("tp_comm_overlap", config, GPU_CLUSTER) else (False if said else None)
    if wanted is said:
        return config
    return config.model_copy(update={"speed": config.speed.model_copy(update={"tp_comm_overlap": wanted})})


@dataclass(frozen=True)
class Speed:
    """A step's time, in seconds of a GPU (the mean over pipeline stages where they differ), and what follows from it.

    Attributes:
        step: the whole step; the sum of the parts below.
        matmul: matrix products of all micro-batches.
        attention: core attention.
        memory_bound: everything between, and casts to FP8.
        recompute: forward passes that are done again.
        communication: tensor, context and pipeline parallelism, as far as nothing hides it.
        uneven: waiting for the slowest stage, in every micro-batch.
        bubble: waiting for the first micro-batches to come and the last ones to go.
        exchange: gradients and weights, as far as nothing hides it.
        optimizer: the update.
        scale: what grows with the number of nodes.
        tokens_per_gpu: tokens a second and GPU.
    """

    step: float
    matmul: float
    attention: float
    memory_bound: float
    recompute: float
    communication: float
    uneven: float
    bubble: float
    exchange: float
    optimizer: float
    scale: float
    tokens_per_gpu: float


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch on one stage, forward and backward."""

    matmul: float
    attention: float
    memory_bound: float
    recompute: float
    communication: float

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.memory_bound + self.recompute + self.communication


def estimate_speed(config: RunConfig, layout: Layout, gpu: Gpu, overlap: Overlap | None = None) -> Speed:
    """The time of a step and where it goes.

    Args:
        config: the run; `batch`, `seq_length`, `parallel`, `precision`, `recompute` and `speed` count.
        layout: the same on a number of GPUs.
        gpu: the GPU.
        overlap: what is hidden; left out: what the run's own knobs hide.
    """
    overlap = overlap or Overlap.of(config)
    links = Links.build(config, layout, gpu)
    parallel, num_micro_batches = config.parallel, layout.num_micro_batches
    passes = [_stage_pass(config, layout, gpu, links, overlap, stage) for stage in range(parallel.pipeline)]
    slowest = max(range(parallel.pipeline), key=lambda stage: passes[stage].total)
    longest = passes[slowest]
    bubble = (sum(one.total for one in passes) - longest.total) / parallel.virtual_pipeline

    def mean(part: str) -> float:
        seconds: float = sum(getattr(one, part) for one in passes)
        return num_micro_batches * seconds / parallel.pipeline

    exchange = _exposed_exchange(config, layout, links, overlap, slowest, longest.total)
    optimizer = _optimizer_seconds(config, layout, gpu, slowest)
    scale = SECONDS_A_DOUBLING * math.log2(max(1.0, layout.num_gpus / gpu.gpus_per_node))
    step = num_micro_batches * longest.total + bubble + exchange + optimizer + scale
    return Speed(
        step=step,
        matmul=mean("matmul"),
        attention=mean("attention"),
        memory_bound=mean("memory_bound"),
        recompute=mean("recompute"),
        communication=mean("communication"),
        uneven=num_micro_batches * longest.total - mean("total"),
        bubble=bubble,
        exchange=exchange,
        optimizer=optimizer,
        scale=scale,
        tokens_per_gpu=config.batch.global_ * config.seq_length / step / layout.num_gpus,
    )


def _stage_pass(config: RunConfig, layout: Layout, gpu: Gpu, links: Links, overlap: Overlap, stage: int) -> _Pass:
    layers = layers_of_stage(config)
    matmul, casts = _layer_matmul(config, layout, gpu, stage)
    attention = _layer_attention(config, gpu)
    between = casts + _layer_bytes(config) / (HBM_EFFICIENCY * gpu.hbm)
    communication = _layer_communication(config, links, overlap, attention)
    head_matmul, head_between = _head(config, gpu) if stage == config.parallel.pipeline - 1 else (0.0, 0.0)
    return _Pass(
        matmul=layers * matmul + head_matmul,
        attention=layers * attention,
        memory_bound=layers * between + head_between,
        recompute=_recompute(config, matmul, attention, between, communication),
        communication=layers * communication + _exposed_pipeline(config, links),
    )


def _linears(config: RunConfig) -> list[tuple[float, float]]:
    """Inputs and outputs of the four linear layers on one tensor-parallel rank."""
    model, split = config.model, config.parallel.tensor
    branches = 2 if model.gated else 1
    return [
        (model.hidden, (query_size(model) + key_value_size(model)) / split),
        (query_size(model) / split, model.hidden),
        (model.hidden, branches * model.ffn_hidden / split),
        (model.ffn_hidden / split, model.hidden),
    ]


def _layer_matmul(config: RunConfig, layout: Layout, gpu: Gpu, stage: int) -> tuple[float, float]:
    """Seconds of a layer's matrix products, forward and backward, and of its casts to FP8: the mean of a stage's."""
    tokens, linears = tokens_of_micro_batch(config), _linears(config)
    bf16 = sum(_matmul(tokens, k, n, gpu.bf16 * BF16_EFFICIENCY, 2, gpu) for k, n in linears)
    if format_of(config) is None or gpu.fp8 is None:
        return bf16, 0.0
    fp8 = sum(_matmul(tokens, k, n, gpu.fp8 * FP8_EFFICIENCY, 1, gpu) for k, n in linears)
    # Inputs and output gradients are read in bf16 and written in FP8, as they are and transposed; weights once a step.
    cast = sum(tokens * (k + n) + k * n / layout.num_micro_batches for k, n in linears) * (2 + 1 + 1)
    share = quantized_layers(config, stage) / layers_of_stage(config)
    return share * fp8 + (1 - share) * bf16, share * cast / (HBM_EFFICIENCY * gpu.hbm)


def _matmul(tokens: float, inputs: float, outputs: float, rate: float, operand_bytes: int, gpu: Gpu) -> float:
    """A linear layer forward, and backward for its input and its weights, whose gradients add up in fp32."""
    sizes = tokens * inputs, inputs * outputs, tokens * outputs
    operands = 2 * operand_bytes * sum(sizes)  # each of the three is an operand of two products
    results = 2 * (sizes[0] + sizes[2]) + (4 + 4) * sizes[1]
    return 3 * 2 * tokens * inputs * outputs / rate + (operands + results) / (HBM_EFFICIENCY * gpu.hbm)


def _layer_attention(config: RunConfig, gpu: Gpu) -> float:
    """Causal core attention: half of all pairs; forward two products, backward five."""
    pairs = tokens_of_micro_batch(config) * config.seq_length / 2
    return (2 + 5) * 2 * pairs * query_size(config.model) / config.parallel.tensor / (ATTENTION_EFFICIENCY * gpu.bf16)


def _layer_bytes(config: RunConfig) -> float:
    """Bytes of a layer's simple kernels through the GPU's memory, forward and backward, in bf16.

    Norm: read, write; backward three. Residual: three; backward three. Activation: its inputs, its output; backward
    gradient, inputs, gradients of inputs. RoPE: read and write queries and keys, both ways.
    """
    model, parallel = config.model, config.parallel
    outside = parallel.tensor if parallel.sequence else 1
    branches = 2 if model.gated else 1
    hidden = 2 * ((2 + 3) + (3 + 3)) * model.hidden / outside
    activation = ((branches + 1) + (1 + 2 * branches)) * model.ffn_hidden / parallel.tensor
    rotary = 4 * (query_size(model) + key_value_size(model) / 2) / parallel.tensor
    return 2 * (hidden + activation + rotary) * tokens_of_micro_batch(config)


def _layer_communication(config: RunConfig, links: Links, overlap: Overlap, attention: float) -> float:
    """What matrix products and attention do not hide.

    In t pieces, a tensor-parallel collective runs beside its product but for one piece. Keys and values of the next
    context-parallel rank travel while those of the last one are attended to.
    """
    parallel = config.parallel
    tensor = tensor_seconds_a_layer(config, links)
    if overlap.tensor and parallel.sequence:
        tensor /= parallel.tensor
    context = context_seconds_a_layer(config, links)
    return tensor + max(0.0, context - attention * (parallel.context - 1) / parallel.context)


def _exposed_pipeline(config: RunConfig, links: Links) -> float:
    """The plain schedule waits for each message, the interleaved one computes another chunk meanwhile."""
    return pipeline_seconds(config, links) if config.parallel.virtual_pipeline == 1 else 0.0


def _head(config: RunConfig, gpu: Gpu) -> tuple[float, float]:
    """The output layer, always in bf16, and the loss.

    The loss passes over logits about 36 bytes each: to fp32 and their maximum (10), the exponentials and their sum
    (12), the softmax (8), its gradient in bf16 (6): the kernels of megatron-core's fused cross entropy.
    """
    rows, tokens = config.model.padded_vocab / config.parallel.tensor, tokens_of_micro_batch(config)
    matmul = _matmul(tokens, config.model.hidden, rows, gpu.bf16 * BF16_EFFICIENCY, 2, gpu)
    return matmul, 36 * rows * tokens / (HBM_EFFICIENCY * gpu.hbm)


def _recompute(config: RunConfig, matmul: float, attention: float, between: float, communication: float) -> float:
    """Forward passes of a stage that are done again: about a third of forward and backward together."""
    recompute, layers = config.recompute, layers_of_stage(config)
    if recompute.granularity == "none":
        return 0.0
    again = attention * 2 / 7
    if recompute.granularity == "selective":
        return layers * again
    if recompute.method == "block":
        layers = min(layers, recompute.num_layers * config.parallel.virtual_pipeline)
    return layers * (again + matmul / 3 + between * 0.4 + communication / 2)


def _exposed_exchange(
    config: RunConfig, layout: Layout, links: Links, overlap: Overlap, stage: int, micro_batch: float
) -> float:
    """Gradients that the last backward pass does not hide, and weights that the first forward pass does not."""
    exchange = GradientExchange.build(config, layout, links, stage, gradient_bytes=overlap.gradient_bytes)
    hidden_reduce = micro_batch * 2 / 3 if overlap.gradients else 0.0
    hidden_gather = micro_batch / 3 if overlap.weights else 0.0
    return max(0.0, exchange.reduce - hidden_reduce) + max(0.0, exchange.gather - hidden_gather)


def _optimizer_seconds(config: RunConfig, layout: Layout, gpu: Gpu, stage: int) -> float:
    """Adam by bytes: gradient, master weight and moments in, all but the gradient out, and the weight in bf16.

    Before it the norm reads every gradient of the shard; after it the whole gradient buffer is cleared.
    """
    whole = shard = stage_parameters(config, stage)
    if config.parallel.distributed_optimizer:
        shard = whole / (layout.data_parallel * config.parallel.context)
    return ((4 + 16 + 14) * shard + 4 * whole) / (HBM_EFFICIENCY * gpu.hbm)
