"""Time of one micro-batch on one pipeline stage, estimated from shapes and published hardware figures.

- Matrix products: operations at a share of the peak of the GPU, plus reading and writing the operands; in FP8 also the
  casts of operands, for weights once per step.
- Attention: operations at a share of the peak, 2.5 times as many backward (FlashAttention recomputes the scores).
- Other kernels (norms, residuals, activation, RoPE, loss): bytes read and written.
- Tensor and context parallelism: the communication that no computation hides.

Kernels are assumed to be fused, regardless of the run's `speed`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.planning.cluster.communication import (
    Links,
    context_seconds_per_layer,
    pipeline_seconds,
    tensor_seconds_per_layer,
)
from megatron_cpt.planning.cost.activations import tokens_of_micro_batch
from megatron_cpt.planning.cost.formats import format_of, quantized_layers
from megatron_cpt.planning.cost.parameters import key_value_size, query_size
from megatron_cpt.planning.cost.rank_layout import Layout, layers_of_stage, stage_chunks
from megatron_cpt.planning.hardware import Gpu

# Share of the dense peak that large matrix products reach during training, at the clock that the power limit allows.
# Fitted to Nemotron-4 15B on 16 H100: bf16 6,159 and FP8 8,275 tokens/s/GPU (NVIDIA dgxc-benchmarking v25.04).
BF16_EFFICIENCY = 0.712
FP8_EFFICIENCY = 0.605
# Share of the bf16 peak of causal attention with heads of 128, forward and backward. FlashAttention-3 reaches 0.6
# forward at 4k and 8k (Shah et al., arXiv 2407.08608, figure 5); backward, the larger part, is assumed to reach 0.5.
ATTENTION_EFFICIENCY = 0.52
# Share of the memory bandwidth that simple kernels reach; assumed.
HBM_EFFICIENCY = 0.85


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch on one stage, forward and backward; `Speed` explains the parts.

    Attributes:
        chunks: of every model chunk, without messages between stages.
    """

    matmul: float
    attention: float
    memory_bound: float
    recompute: float
    communication: float
    chunks: tuple[float, ...]

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.matmul + self.attention + self.memory_bound + self.recompute + self.communication

    @property
    def forward(self) -> float:
        """Seconds of the forward pass alone, with the shares that `_recompute` assumes."""
        return self.matmul / 3 + self.attention * 2 / 7 + self.memory_bound * 0.4 + self.communication / 2


def stage_time(
    config: RunConfig, layout: Layout, gpu: Gpu, links: Links, stage: int, *, overlaps_tensor: bool
) -> StageTime:
    """Estimate one micro-batch on one stage; `overlaps_tensor` hides tensor-parallel communication."""
    sizes = [len(chunk) for chunk in stage_chunks(config, stage)]
    layers = sum(sizes)
    matmul, casts = _layer_matmul(config, layout, gpu, stage)
    attention = _layer_attention(config, gpu)
    simple = casts + _layer_bytes(config) / (HBM_EFFICIENCY * gpu.hbm)
    communication = _layer_communication(config, links, attention, overlaps_tensor=overlaps_tensor)
    head_matmul, loss = _head(config, gpu) if stage == config.parallel.pipeline - 1 else (0.0, 0.0)
    # The interleaved schedule computes another chunk while a message is on its way; the plain one waits.
    messages = pipeline_seconds(config, links) if config.parallel.virtual_pipeline == 1 else 0.0
    repeated = [_recompute(config, size, matmul, attention, simple, communication) for size in sizes]
    chunks = [
        size * (matmul + attention + simple + communication) + again
        for size, again in zip(sizes, repeated, strict=True)
    ]
    chunks[-1] += head_matmul + loss
    return StageTime(
        matmul=layers * matmul + head_matmul,
        attention=layers * attention,
        memory_bound=layers * simple + loss,
        recompute=sum(repeated),
        communication=layers * communication + messages,
        chunks=tuple(chunks),
    )


def _linears(config: RunConfig) -> list[tuple[float, float]]:
    """Return input and output sizes of the four linear layers of a transformer layer on one tensor-parallel rank."""
    model, split = config.model, config.parallel.tensor
    branches = 2 if model.gated else 1
    return [
        (model.hidden, (query_size(model) + key_value_size(model)) / split),
        (query_size(model) / split, model.hidden),
        (model.hidden, branches * model.ffn_hidden / split),
        (model.ffn_hidden / split, model.hidden),
    ]


def _layer_matmul(config: RunConfig, layout: Layout, gpu: Gpu, stage: int) -> tuple[float, float]:
    """Return seconds per layer of matrix products and of casts to FP8, averaged over the layers of a stage."""
    tokens, linears = tokens_of_micro_batch(config), _linears(config)
    bf16 = sum(_matmul(tokens, k, n, gpu.bf16 * BF16_EFFICIENCY, 2, gpu) for k, n in linears)
    if format_of(config) is None or gpu.fp8 is None:
        return bf16, 0.0
    fp8 = sum(_matmul(tokens, k, n, gpu.fp8 * FP8_EFFICIENCY, 1, gpu) for k, n in linears)
    # Inputs and output gradients are read in bf16 (2 bytes) and written in FP8 plain and transposed (1 + 1); weights
    # are cast once per step, or by backend `torch` for the two products of each micro-batch that use them.
    casts = 2 if config.precision.has_local_fp8 else 1 / layout.num_micro_batches
    cast = sum(tokens * (k + n) + k * n * casts for k, n in linears) * (2 + 1 + 1)
    share = quantized_layers(config, stage) / max(1, layers_of_stage(config, stage))
    return share * fp8 + (1 - share) * bf16, share * cast / (HBM_EFFICIENCY * gpu.hbm)


def _matmul(tokens: float, inputs: float, outputs: float, rate: float, operand_bytes: int, gpu: Gpu) -> float:
    """Return seconds of a linear layer: forward, input gradient, and weight gradient accumulated in fp32."""
    sizes = tokens * inputs, inputs * outputs, tokens * outputs
    operands = 2 * operand_bytes * sum(sizes)  # each tensor is an operand of two of the three products
    results = 2 * (sizes[0] + sizes[2]) + (4 + 4) * sizes[1]
    return 3 * 2 * tokens * inputs * outputs / rate + (operands + results) / (HBM_EFFICIENCY * gpu.hbm)


def _layer_attention(config: RunConfig, gpu: Gpu) -> float:
    """Return seconds of causal core attention: half of all pairs, two products forward and five backward."""
    pairs = tokens_of_micro_batch(config) * config.seq_length / 2
    return (2 + 5) * 2 * pairs * query_size(config.model) / config.parallel.tensor / (ATTENTION_EFFICIENCY * gpu.bf16)


def _layer_bytes(config: RunConfig) -> float:
    """Return bytes that the simple kernels of a layer read and write, forward and backward, in bf16.

    A norm moves 2 tensors forward and 3 backward, a residual addition 3 and 3. An activation moves inputs and output
    forward; gradient, inputs and input gradients backward. RoPE reads and writes queries and keys in both directions.
    """
    model, parallel = config.model, config.parallel
    outside = parallel.tensor if parallel.sequence else 1
    branches = 2 if model.gated else 1
    hidden = 2 * ((2 + 3) + (3 + 3)) * model.hidden / outside
    activation = ((branches + 1) + (1 + 2 * branches)) * model.ffn_hidden / parallel.tensor
    rotary = 4 * (query_size(model) + key_value_size(model) / 2) / parallel.tensor
    return 2 * (hidden + activation + rotary) * tokens_of_micro_batch(config)


def _layer_communication(config: RunConfig, links: Links, attention: float, *, overlaps_tensor: bool) -> float:
    """Return seconds of communication per layer that matrix products and attention do not hide.

    An overlapped collective of t tensor-parallel ranks is split into t pieces, of which only one is exposed. Keys and
    values of the next context-parallel rank arrive during attention to the previous ones.
    """
    parallel = config.parallel
    tensor = tensor_seconds_per_layer(config, links)
    if overlaps_tensor and parallel.sequence:
        tensor /= parallel.tensor
    context = context_seconds_per_layer(config, links)
    return tensor + max(0.0, context - attention * (parallel.context - 1) / parallel.context)


def _head(config: RunConfig, gpu: Gpu) -> tuple[float, float]:
    """Return seconds of the output layer, always in bf16, and of the loss.

    megatron-core's fused cross entropy moves about 36 bytes per logit: cast to fp32 and maximum (10), exponentials and
    their sum (12), softmax (8), gradient in bf16 (6).
    """
    rows, tokens = config.model.padded_vocab / config.parallel.tensor, tokens_of_micro_batch(config)
    matmul = _matmul(tokens, config.model.hidden, rows, gpu.bf16 * BF16_EFFICIENCY, 2, gpu)
    return matmul, 36 * rows * tokens / (HBM_EFFICIENCY * gpu.hbm)


def _recompute(
    config: RunConfig, layers: int, matmul: float, attention: float, simple: float, communication: float
) -> float:
    """Return seconds of repeated forward passes of a model chunk; forward is about a third of forward and backward."""
    recompute = config.recompute
    if recompute.granularity == "none":
        return 0.0
    forward_attention = attention * 2 / 7
    if recompute.granularity == "selective":
        return layers * forward_attention
    if recompute.method == "block":
        layers = min(layers, recompute.num_layers)
    return layers * (forward_attention + matmul / 3 + simple * 0.4 + communication / 2)
