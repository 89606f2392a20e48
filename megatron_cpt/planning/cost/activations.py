"""Activation memory: the tensors that autograd saves for backward passes.

They depend on the layer spec, so `layer_activation_bytes` counts two kinds:

- `te`: Transformer Engine on a GPU. The terms are taken from Korthikanti et al., *Reducing Activation Recomputation in
  Large Transformer Models* (arXiv 2205.05198), extended to grouped queries, gated MLPs, fused attention and FP8. With
  an MLP of 4 x hidden, one key/value head per query head, dropout and unfused attention they sum to the paper's
  34 + 5 a s / h bytes per token and hidden unit.
- `local`: torch's own kernels, which run on a CPU; `benchmarks/memory_model.py` compares it with real runs.

The number of micro-batches in flight follows megatron-core's 1F1B and interleaved schedules (Narayanan et al., arXiv
2104.04473).
"""

from __future__ import annotations

from functools import lru_cache
from operator import mul
from typing import Literal

from megatron_cpt.config import RunConfig
from megatron_cpt.config.knobs import GPU_CLUSTER, fuses_swiglu
from megatron_cpt.config.model import Norm
from megatron_cpt.planning.cost.formats import format_of
from megatron_cpt.planning.cost.parameters import key_value_size, query_size
from megatron_cpt.planning.cost.rank_layout import Layout, stage_chunks

Spec = Literal["te", "local"]


def default_spec(config: RunConfig) -> Spec:
    """Return the layer spec of a plan: Transformer Engine for bf16, else torch's own kernels, also for their FP8."""
    return "te" if config.precision.compute == "bf16" and not config.precision.has_local_fp8 else "local"


def layer_activation_bytes(config: RunConfig, *, spec: Spec | None = None, fused_attention: bool = True) -> float:
    """Return the bytes per rank that one layer saves of one micro-batch, without full recomputation.

    `spec=None` means `default_spec`. Fused attention (FlashAttention, cuDNN; `te` only) does not store the
    seq_length x seq_length scores.
    """
    spec = spec or default_spec(config)
    model, split, outside = config.model, config.parallel.tensor, _ranks_outside_matmuls(config)
    size = _element_bytes(config)
    kind = format_of(config)
    linear_input = kind.saved if kind is not None else size
    # Both norms save their input, and the matrix products after them save the output of the norm.
    per_token = 2 * model.hidden * (_norm_input_bytes(config, spec) + linear_input) / outside
    per_token += 2 * model.hidden / outside if model.hidden_dropout else 0.0  # a mask of one byte per element
    per_token += _attention_bytes(config, spec, fused_attention) / split
    # Tensors saved by the activation, and the input of the matrix product after it.
    per_token += (_activation_inputs(config, spec) * size + linear_input) * model.ffn_hidden / split
    return per_token * tokens_of_micro_batch(config) + _tables_of_layer(config, spec)


def _norm_input_bytes(config: RunConfig, spec: Spec) -> int:
    size = _element_bytes(config)
    if spec == "te" or config.model.norm != Norm.RMSNORM:
        return size
    # torch's rms_norm on a CPU is composed of several operations, which save the input and the quotient in fp32.
    return 4 + 4


def _attention_bytes(config: RunConfig, spec: Spec, fused: bool) -> float:
    """Return bytes per token saved by attention: from its first matrix product to the input of its second."""
    model, size = config.model, _element_bytes(config)
    queries, keys_values, heads = query_size(model), key_value_size(model), model.heads
    selective = config.recompute.granularity == "selective"
    row_sums = 0.0 if selective else 4.0 * heads  # log-sum-exp per row, in fp32
    kind = format_of(config)
    # With FP8 or FP4 the output product also saves its input in that format, unless that is the bf16 tensor itself.
    output_input = queries * kind.saved if kind is not None and kind.saved < size else 0
    if spec == "te":
        kept: float = size * (queries + keys_values + queries) + output_input
        kept += size * (queries + keys_values / 2) if model.qk_norm else 0
        if fused:
            return kept + row_sums
        scores = 0 if selective else heads * config.seq_length
        # The softmax, and with dropout its mask of one byte and the scores after dropout.
        return kept + scores * (size + (1 + size if model.attention_dropout else 0))
    # Values are a view, which keeps the joint product of queries, keys and values alive; RoPE copies queries and keys.
    kept = size * (queries + keys_values + queries + keys_values / 2 + queries) + output_input
    kept += size * queries if model.qk_norm else 0
    if model.attention_dropout and not selective:
        # CPU kernels have no dropout: softmax, mask and product are in fp32, and so are queries, keys and values.
        return kept + 3 * 4 * heads * config.seq_length + 3 * 4 * queries
    mask = size * config.seq_length * config.parallel.tensor if config.documents.reset_attention else 0
    return kept + row_sums + (0 if selective else mask)


def _activation_inputs(config: RunConfig, spec: Spec) -> int:
    """Return the number of tensors, each as wide as the MLP, that the activation saves.

    A plain activation saves 1 and fused SwiGLU 2 (both branches). A gated activation of separate operations saves 4:
    also the activated branch and megatron-core's copy of the other branch (`x + glu_linear_offset`).
    """
    if not config.model.gated:
        return 1
    return 2 if spec == "te" and fuses_swiglu(config, GPU_CLUSTER) else 4


def _tables_of_layer(config: RunConfig, spec: Spec) -> float:
    """Return bytes of RoPE's cosines and sines, computed for queries and keys separately unless RoPE is fused.

    They do not depend on the micro-batch size.
    """
    if spec == "te":
        return 0.0
    rotary = config.model.head_size * config.model.rotary_percent
    return 4 * _element_bytes(config) * rotary * config.seq_length / config.parallel.context


def tokens_of_micro_batch(config: RunConfig) -> float:
    """Return the tokens of a micro-batch per context-parallel rank."""
    return config.batch.micro * config.seq_length / config.parallel.context


def _element_bytes(config: RunConfig) -> int:
    return 2 if config.precision.compute == "bf16" else 4


def _ranks_outside_matmuls(config: RunConfig) -> int:
    """Return the number of ranks that share tensors between matrix products; sequence parallelism splits these too."""
    return config.parallel.tensor if config.parallel.sequence else 1


def _hidden_bytes(config: RunConfig) -> float:
    """Return bytes of the residual stream of one micro-batch on one rank."""
    return _element_bytes(config) * config.model.hidden / _ranks_outside_matmuls(config) * tokens_of_micro_batch(config)


def stage_activation_bytes(config: RunConfig, layout: Layout, stage: int, spec: Spec) -> float:
    """Return bytes of activations of one stage: of its layers for all micro-batches in flight, and of the head."""
    hidden, stages = _hidden_bytes(config), config.parallel.pipeline
    sizes = tuple(map(len, stage_chunks(config, stage)))
    in_flight = _passes_in_flight(stages, stage, layout.num_micro_batches, sizes)
    layer = layer_activation_bytes(config, spec=spec)
    kept = sum(
        passes * _chunk_activation_bytes(config, layers, layer, hidden)
        for passes, layers in zip(in_flight, sizes, strict=True)
    )
    # The interleaved schedule keeps the output that a chunk has sent until its backward pass.
    sent = hidden if config.parallel.virtual_pipeline > 1 else 0.0
    if stage < stages - 1:
        return kept + sum(in_flight) * sent
    # Input and output of the final norm, for one micro-batch at a time.
    head = hidden * (1 + _norm_input_bytes(config, spec) / _element_bytes(config))
    return kept + (sum(in_flight) - 1) * sent + head


def _chunk_activation_bytes(config: RunConfig, layers: int, layer: float, layer_input: float) -> float:
    """Return bytes that a model chunk of a number of layers saves of one micro-batch."""
    recompute = config.recompute
    if recompute.granularity != "full" or layers == 0:
        return layers * layer
    unit = min(recompute.num_layers, layers)
    if recompute.method == "uniform":  # the input of each unit of layers
        return -(-layers // unit) * layer_input
    return unit * layer_input + (layers - unit) * layer


def working_bytes(config: RunConfig, stage: int, spec: Spec) -> float:
    """Return bytes of the layer that runs backward: gradients as wide as the MLP, and one of the residual stream.

    With full recomputation the activations of the recomputed layers are added.
    """
    model, recompute = config.model, config.recompute
    num_wide = 4 if model.gated else 3  # measured: alive at the same time inside the activation
    wide = num_wide * model.ffn_hidden / config.parallel.tensor * _element_bytes(config) * tokens_of_micro_batch(config)
    working = wide + _hidden_bytes(config)
    if recompute.granularity != "full":
        return working
    layers = max(map(len, stage_chunks(config, stage)))
    recomputed = min(recompute.num_layers, layers)
    if recompute.method == "block":
        # The first layers of a chunk are recomputed last, when the activations of the others are freed.
        recomputed = int(recomputed == layers)
    return working + recomputed * layer_activation_bytes(config, spec=spec)


@lru_cache(maxsize=4096)
def _passes_in_flight(stages: int, stage: int, num_micro_batches: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of passes of each chunk of a stage, of `sizes` layers, whose activations it holds at its peak.

    With 4 stages, stage 0 holds 4 micro-batches under 1F1B. Interleaved with 2 chunks per rank it holds 2 x 3 + 4 + 1 =
    11 half stages, 1 + (p - 1) / (p v) = 1.375 times as much (Narayanan et al., arXiv 2104.04473).
    """
    virtual, ahead = len(sizes), stages - stage - 1
    total = num_micro_batches * virtual
    limit = min(total, 2 * ahead + (virtual - 1) * stages + 1 if virtual > 1 else ahead + 1)
    # Chunks take turns: groups of `stages` micro-batches pass chunk 0, then chunk 1, ..., and go back in reverse order.
    held = [0] * virtual
    for number in range(limit):
        held[number // stages % virtual] += 1
    peak = tuple(held)
    for number in range(limit, min(total, limit + 2 * stages * virtual)):
        held[virtual - 1 - (number - limit) // stages % virtual] -= 1
        held[number // stages % virtual] += 1
        peak = max(peak, tuple(held), key=lambda passes: sum(map(mul, passes, sizes)))
    return peak


def logits_bytes(config: RunConfig) -> float:
    """Return bytes of the logits of one micro-batch and of their softmax in fp32, which overwrites fp32 logits.

    Distillation overwrites the logits piece by piece, unless its weight is 0.
    """
    is_overwritten = config.precision.compute == "fp32" or (config.teacher is not None and config.teacher.weight > 0)
    per_logit = (2 if config.precision.compute == "bf16" else 4) + (0 if is_overwritten else 4)
    return per_logit * config.model.padded_vocab / config.parallel.tensor * tokens_of_micro_batch(config)
