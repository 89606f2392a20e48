"""What autograd keeps for backward passes, tensor by tensor.

It depends on the layer spec, so there are two lists (see `layer_activation_bytes`):

- `te`: Transformer Engine on a GPU. The terms are those of Korthikanti et al., *Reducing Activation Recomputation in
  Large Transformer Models* (arXiv 2205.05198), extended to grouped queries, gated MLPs, fused attention and FP8; with
  4 x hidden in the MLP, a head for each query, dropout and unfused attention they add up to the paper's 34 + 5 a s / h
  bytes a token and hidden unit.
- `local`: torch's own kernels, which is what a CPU runs; `benchmarks/memory_model.py` holds it against real runs.

How many micro-batches are in flight follows megatron-core's 1F1B and interleaved schedules (Narayanan et al., arXiv
2104.04473).
"""

from __future__ import annotations

from typing import Literal

from megatron_cpt.config import RunConfig
from megatron_cpt.config.knobs import GPU_CLUSTER, fuses_swiglu
from megatron_cpt.config.model import Norm
from megatron_cpt.plan.cost.formats import format_of
from megatron_cpt.plan.cost.parameters import key_value_size, query_size
from megatron_cpt.plan.cost.rank_layout import Layout

Spec = Literal["te", "local"]


def default_spec(config: RunConfig) -> Spec:
    """The layer spec that is planned for: bf16 is for GPUs with Transformer Engine, which has no use for fp32."""
    return "te" if config.precision.compute == "bf16" else "local"


def layers_of_stage(config: RunConfig) -> int:
    """Layers that each pipeline stage holds."""
    return max(1, config.model.layers // config.parallel.pipeline)


def layer_activation_bytes(config: RunConfig, *, spec: Spec | None = None, fused_attention: bool = True) -> float:
    """What one layer keeps of one micro-batch for its backward pass, without recomputation of whole layers.

    Args:
        config: the run.
        spec: the layer spec; left out: `default_spec`.
        fused_attention: `te` only: whether attention never stores the seq_length x seq_length scores (FlashAttention,
            cuDNN).

    Returns:
        Bytes on one rank.
    """
    spec = spec or default_spec(config)
    model, split, outside = config.model, config.parallel.tensor, _split_outside(config)
    size = _size(config)
    kind = format_of(config)
    linear_input = kind.kept if kind is not None and spec == "te" else size
    # Both norms keep their input, the matrix products after them the norm's output.
    per_token = 2 * model.hidden * (_norm_input_bytes(config, spec) + linear_input) / outside
    per_token += 2 * model.hidden / outside if model.hidden_dropout else 0.0  # dropout keeps one byte an element
    per_token += _attention_bytes(config, spec, fused_attention) / split
    # What the activation keeps, and the input of the matrix product after it.
    per_token += (_activation_inputs(config, spec) * size + linear_input) * model.ffn_hidden / split
    return per_token * tokens_of_micro_batch(config) + _tables_of_layer(config, spec)


def _norm_input_bytes(config: RunConfig, spec: Spec) -> int:
    size = _size(config)
    if spec == "te" or config.model.norm != Norm.RMSNORM:
        return size
    # torch's rms_norm on a CPU is made of parts: the input in fp32, and what is left after division, also in fp32.
    return 4 + 4


def _attention_bytes(config: RunConfig, spec: Spec, fused: bool) -> float:
    """Bytes a token of attention between its two matrix products, and the input of the second, over all heads."""
    model, size = config.model, _size(config)
    queries, keys_values, heads = query_size(model), key_value_size(model), model.heads
    selective = config.recompute.granularity == "selective"
    row_sums = 0.0 if selective else 4.0 * heads  # the logarithm of each row's sum, in fp32
    if spec == "te":
        kept: float = size * (queries + keys_values + queries)
        # With FP8 the output product keeps its input again, in FP8; with FP4 in FP4.
        kind = format_of(config)
        kept += queries * kind.kept if kind is not None else 0
        kept += size * (queries + keys_values / 2) if model.qk_norm else 0
        if fused:
            return kept + row_sums
        scores = 0 if selective else heads * config.seq_length
        # The softmax; with dropout also its mask of one byte and what is left of the scores after it.
        return kept + scores * (size + (1 + size if model.attention_dropout else 0))
    # Values are a view that keeps the whole product of queries, keys and values alive; RoPE copies queries and keys.
    kept = size * (queries + keys_values + queries + keys_values / 2 + queries)
    kept += size * queries if model.qk_norm else 0
    if model.attention_dropout and not selective:
        # No kernel on a CPU has dropout: softmax, mask and product in fp32, and queries, keys, values in fp32 for them.
        return kept + 3 * 4 * heads * config.seq_length + 3 * 4 * queries
    mask = size * config.seq_length * config.parallel.tensor if config.documents.reset_attention else 0
    return kept + row_sums + (0 if selective else mask)


def _activation_inputs(config: RunConfig, spec: Spec) -> int:
    """Tensors as wide as the MLP that the activation keeps: one; gated, made of parts, four; SwiGLU in one kernel, two.

    Both branches, and of parts also the activated one and megatron-core's copy of the other (`x + glu_linear_offset`).
    """
    if not config.model.gated:
        return 1
    return 2 if spec == "te" and fuses_swiglu(config, GPU_CLUSTER) else 4


def _tables_of_layer(config: RunConfig, spec: Spec) -> float:
    """RoPE's cosines and sines, made anew for queries and keys where it is not one kernel; for any micro-batch size."""
    if spec == "te":
        return 0.0
    rotary = config.model.head_size * config.model.rotary_percent
    return 4 * _size(config) * rotary * config.seq_length / config.parallel.context


def tokens_of_micro_batch(config: RunConfig) -> float:
    """Tokens of a micro-batch on one rank (before tensor parallelism)."""
    return config.batch.micro * config.seq_length / config.parallel.context


def _size(config: RunConfig) -> int:
    return 2 if config.precision.compute == "bf16" else 4


def _split_outside(config: RunConfig) -> int:
    """Over how many ranks lies what is between the matrix products: sequence parallelism shards that too."""
    return config.parallel.tensor if config.parallel.sequence else 1


def _hidden_bytes(config: RunConfig) -> float:
    """The residual stream of one micro-batch on one rank."""
    return _size(config) * config.model.hidden / _split_outside(config) * tokens_of_micro_batch(config)


def kept_bytes(config: RunConfig, layout: Layout, stage: int, spec: Spec) -> float:
    """Activations of one stage: its layers, for every micro-batch in flight, and the input of the head."""
    hidden, stages = _hidden_bytes(config), config.parallel.pipeline
    kept = _kept_by_chunk(config, layer_activation_bytes(config, spec=spec), hidden)
    in_flight = _chunks_in_flight(config, layout, stage)
    if stage < stages - 1:
        # megatron-core holds the output that a chunk has sent until its backward pass.
        return in_flight * (kept + hidden)
    # Input and output of the final norm; only one micro-batch at a time gets there.
    head = hidden * (1 + _norm_input_bytes(config, spec) / _size(config))
    return in_flight * kept + (in_flight - 1) * hidden + head


def _kept_by_chunk(config: RunConfig, layer: float, layer_input: float) -> float:
    """Bytes that a model chunk keeps of one micro-batch."""
    layers = max(1, layers_of_stage(config) // config.parallel.virtual_pipeline)
    recompute = config.recompute
    if recompute.granularity != "full":
        return layers * layer
    unit = min(recompute.num_layers, layers)
    if recompute.method == "uniform":  # the input of each group of `unit` layers
        return -(-layers // unit) * layer_input
    return unit * layer_input + (layers - unit) * layer


def working_bytes(config: RunConfig, spec: Spec) -> float:
    """Bytes of the layer at work in a backward pass: gradients as wide as the MLP, and one of the residual stream.

    With full recomputation, also the activations of the layers that were just recomputed.
    """
    model, recompute = config.model, config.recompute
    num_wide = 4 if model.gated else 3  # alive at once inside the activation, as measured
    wide = num_wide * model.ffn_hidden / config.parallel.tensor * _size(config) * tokens_of_micro_batch(config)
    working = wide + _hidden_bytes(config)
    if recompute.granularity != "full":
        return working
    layers = max(1, layers_of_stage(config) // config.parallel.virtual_pipeline)
    again = min(recompute.num_layers, layers)
    if recompute.method == "block":
        # The first layers of a chunk are recomputed last, when what the others kept is gone.
        again = int(again == layers)
    return working + again * layer_activation_bytes(config, spec=spec)


def _chunks_in_flight(config: RunConfig, layout: Layout, stage: int) -> int:
    """Chunks whose activations a stage holds at once: forward passes before its first backward pass, and that one.

    The 1F1B schedule, and the interleaved one where the first stage holds 1 + (p - 1) / (p v) times as much
    (Narayanan et al., arXiv 2104.04473).
    """
    stages, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    total = layout.num_micro_batches * virtual
    ahead = stages - stage - 1
    return min(total, 2 * ahead + (virtual - 1) * stages + 1 if virtual > 1 else ahead + 1)


def logits_bytes(config: RunConfig) -> float:
    """Logits of one micro-batch and their softmax in fp32, which takes the place of logits that are fp32 already."""
    per_logit = 2 + 4 if config.precision.compute == "bf16" else 4
    return per_logit * config.model.padded_vocab / config.parallel.tensor * tokens_of_micro_batch(config)
