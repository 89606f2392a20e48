"""A first estimate of the memory that a GPU needs, part by part.

The terms are those of Korthikanti et al., *Reducing Activation Recomputation in Large Transformer Models* (arXiv
2205.05198), taken tensor by tensor so that they also hold for grouped queries, gated MLPs, models without dropout and
fused attention; with 4 x hidden in the MLP, a head for each query, dropout and unfused attention they add up to the
paper's 34 + 5 a s / h bytes a token and hidden unit. States follow ZeRO (Rajbhandari et al., arXiv 1910.02054).

Not counted: the CUDA context, communication buffers, workspaces of the kernels and what the allocator loses to
fragmentation; leave 10 to 15 % of a GPU for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.plan.layout import Layout
from megatron_cpt.plan.parameters import count_parameters, key_value_size, norm_size, query_size

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU of one pipeline stage.

    Attributes:
        stage: the pipeline stage, from 0.
        weights: in the compute format, and their FP8 copies.
        gradients: accumulated over the micro-batches of a step, in fp32.
        optimizer: fp32 master weights (bf16 runs) and both moments of Adam.
        activations: kept for the backward passes of all micro-batches in flight.
        logits: of one micro-batch, on the last stage.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All parts, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def to_dict(self) -> dict[str, float]:
        """The parts in GiB, and the stage they are of."""
        parts = {name: value / GIB for name, value in asdict(self).items() if name != "stage"}
        return {"stage": self.stage, **parts}


def estimate_memory(config: RunConfig, layout: Layout) -> Memory:
    """The memory of the pipeline stage that needs most."""
    stages = (stage_memory(config, layout, stage) for stage in range(config.parallel.pipeline))
    return max(stages, key=lambda memory: memory.total)


def stage_memory(config: RunConfig, layout: Layout, stage: int) -> Memory:
    """The memory of one pipeline stage (from 0)."""
    sharded, replicated = _stage_parameters(config, stage)
    parameters = sharded / config.parallel.tensor + replicated
    is_bf16 = config.precision.compute == "bf16"
    # bf16: a master copy and two moments in fp32; fp32 weights are their own master.
    optimizer = (12 if is_bf16 else 8) * parameters
    if config.parallel.distributed_optimizer:
        optimizer /= layout.data_parallel * config.parallel.context
    weights = (2 if is_bf16 else 4) * parameters
    if config.precision.fp8 is not None:
        # Transformer Engine keeps two FP8 copies of each linear weight over a step: as it is, and transposed.
        weights += 2 * _layers_of(config) * count_parameters(config.model).layer.matmul / config.parallel.tensor
    is_last = stage == config.parallel.pipeline - 1
    return Memory(
        stage=stage,
        weights=weights,
        gradients=4 * parameters,
        optimizer=optimizer,
        activations=_activations(config, layout, stage),
        logits=_logits(config) if is_last else 0.0,
    )


def _layers_of(config: RunConfig) -> int:
    return max(1, config.model.layers // config.parallel.pipeline)


def _stage_parameters(config: RunConfig, stage: int) -> tuple[float, float]:
    """Parameters of one stage: those that tensor parallelism shards, and those every tensor rank holds."""
    model, parts = config.model, count_parameters(config.model)
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    # Where embedding and head are tied but on different stages, the last stage holds a copy.
    tables = int(first) + int(last and not (model.tied_embeddings and first))
    sharded = _layers_of(config) * parts.layer.matmul + tables * model.padded_vocab * model.hidden
    replicated = _layers_of(config) * (parts.layer.norms + parts.layer.biases) + (norm_size(model) if last else 0)
    return float(sharded), float(replicated)


def layer_activation_bytes(config: RunConfig, *, fused_attention: bool | None = None) -> float:
    """What one layer keeps of one micro-batch for its backward pass, without recomputation of whole layers.

    Args:
        config: the run.
        fused_attention: whether attention never stores the seq_length x seq_length scores (FlashAttention, cuDNN).
            Left out: in bf16, unless attention stops at document boundaries; there is no fused kernel for fp32.

    Returns:
        Bytes on one GPU.
    """
    model, parallel = config.model, config.parallel
    if fused_attention is None:
        fused_attention = config.precision.compute == "bf16" and not config.documents.reset_attention
    size = 2 if config.precision.compute == "bf16" else 4
    split = parallel.tensor
    outside = (
        split if parallel.sequence else 1
    )  # sequence parallelism also shards what lies between the matrix products
    branches = 2 if model.gated else 1
    queries, ffn = query_size(model), model.ffn_hidden
    # Elements a token. Norms keep their input; matrix products theirs, which is the norm's output; and so on.
    norms_and_inputs = 4 * model.hidden / outside
    attention = (queries + key_value_size(model) + queries) / split
    mlp = (branches * ffn + ffn) / split
    masks = 2 * model.hidden / outside if model.hidden_dropout else 0.0  # dropout keeps one byte an element
    per_token = size * (norms_and_inputs + attention + mlp) + masks
    per_token += _attention_core_bytes(config, size, fused_attention) / split
    return per_token * _tokens_of_micro_batch(config)


def _attention_core_bytes(config: RunConfig, size: int, fused_attention: bool) -> float:
    """Bytes a token of what lies between queries, keys, values and the attention's output, over all heads."""
    model = config.model
    if fused_attention:
        return 4.0 * model.heads  # the logarithm of each row's sum, in fp32
    if config.recompute.granularity == "selective":
        return 0.0
    scores = model.heads * config.seq_length
    # The softmax; with dropout also its mask of one byte and what is left of the scores after it.
    return float(scores * (size + (1 + size if model.attention_dropout else 0)))


def _tokens_of_micro_batch(config: RunConfig) -> float:
    return config.batch.micro * config.seq_length / config.parallel.context


def _activations(config: RunConfig, layout: Layout, stage: int) -> float:
    """Activations of one stage: its layers, for every micro-batch in flight, and the input of the head."""
    model, parallel = config.model, config.parallel
    size = 2 if config.precision.compute == "bf16" else 4
    outside = parallel.tensor if parallel.sequence else 1
    hidden = size * model.hidden / outside * _tokens_of_micro_batch(config)
    kept, working = _kept_by_chunk(config, layer_activation_bytes(config), hidden)
    # Input and output of the final norm; only one micro-batch at a time gets there.
    head = 2 * hidden if stage == parallel.pipeline - 1 else 0.0
    return _chunks_in_flight(config, layout, stage) * kept + working + head


def _kept_by_chunk(config: RunConfig, layer: float, layer_input: float) -> tuple[float, float]:
    """Bytes that a model chunk keeps of one micro-batch, and those it needs while layers are recomputed."""
    layers = max(1, _layers_of(config) // config.parallel.virtual_pipeline)
    recompute = config.recompute
    if recompute.granularity != "full":
        return layers * layer, 0.0
    unit = min(recompute.num_layers, layers)
    if recompute.method == "uniform":  # the input of each group of `unit` layers; one group at work
        return -(-layers // unit) * layer_input, unit * layer
    return unit * layer_input + (layers - unit) * layer, layer


def _chunks_in_flight(config: RunConfig, layout: Layout, stage: int) -> int:
    """Chunks whose activations a stage holds at once: forward passes before its first backward pass, and that one.

    The 1F1B schedule, and the interleaved one where the first stage holds 1 + (p - 1) / (p v) times as much
    (Narayanan et al., arXiv 2104.04473).
    """
    stages, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    total = layout.num_micro_batches * virtual
    ahead = stages - stage - 1
    return min(total, 2 * ahead + (virtual - 1) * stages + 1 if virtual > 1 else ahead + 1)


def _logits(config: RunConfig) -> float:
    """Logits in the compute format and their softmax in fp32, of one micro-batch."""
    size = 2 if config.precision.compute == "bf16" else 4
    return (size + 4) * config.model.padded_vocab / config.parallel.tensor * _tokens_of_micro_batch(config)
