"""Number of parameters of a model, part by part, and its floating-point operations (FLOPs).

A matrix product costs 2 operations per weight and token forward and 4 backward, 6 in total (Kaplan et al., arXiv
2001.08361). Looking up an embedding costs none, so only the head counts. Attention multiplies each query with every key
and each score with every value: 2 x 2 x seq_length x queries forward, three times as many in training (PaLM, arXiv
2204.02311, appendix B). Norms, activations, softmax and recomputation do not count, as in published MFU figures.

A causal model needs only half of the attention, but many published figures count all of it, so both are reported.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config import ModelConfig, Norm


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one transformer layer.

    Attributes:
        attention: weights of the query/key/value and output projections.
        biases: of all linear layers.
        norms: of the two layer norms, and of the query and key norms with `qk_norm`.
    """

    attention: int
    mlp: int
    biases: int
    norms: int

    @property
    def total(self) -> int:
        """Parameters of the layer."""
        return self.attention + self.mlp + self.biases + self.norms

    @property
    def matmul(self) -> int:
        """Parameters of weight matrices."""
        return self.attention + self.mlp


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model.

    Attributes:
        embedding: one row per token id, without padding rows.
        final_norm: of the norm before the head.
        head: of the output layer; 0 if it shares the weights of the embedding.
        padding: rows added to embedding and head to reach `padded_vocab`; not in `total`.
    """

    layer: LayerParameters
    num_layers: int
    embedding: int
    final_norm: int
    head: int
    padding: int

    @property
    def total(self) -> int:
        """Parameters of the model; shared parameters count once."""
        return self.num_layers * self.layer.total + self.embedding + self.final_norm + self.head

    def to_dict(self) -> dict[str, int]:
        """Return counts by part, over all layers."""
        layers = self.num_layers
        return {
            "embedding": self.embedding,
            "attention": layers * self.layer.attention,
            "mlp": layers * self.layer.mlp,
            "biases": layers * self.layer.biases,
            "norms": layers * self.layer.norms + self.final_norm,
            "head": self.head,
            "padding": self.padding,
        }


def count_parameters(model: ModelConfig) -> Parameters:
    """Count the parameters of a model."""
    hidden, padding = model.hidden, (model.padded_vocab - model.vocab) * model.hidden
    return Parameters(
        layer=_count_layer(model),
        num_layers=model.layers,
        embedding=model.vocab * hidden,
        final_norm=norm_size(model),
        head=0 if model.tied_embeddings else model.vocab * hidden,
        padding=padding if model.tied_embeddings else 2 * padding,
    )


def query_size(model: ModelConfig) -> int:
    """Return the width of all queries of one token."""
    return model.heads * model.head_size


def key_value_size(model: ModelConfig) -> int:
    """Return the width of all keys and values of one token together."""
    return 2 * model.num_kv_groups * model.head_size


def norm_size(model: ModelConfig, width: int | None = None) -> int:
    """Return the parameters of one norm over a width, the hidden width if not given; RMSNorm has no bias."""
    weights = width or model.hidden
    return weights if model.norm == Norm.RMSNORM else 2 * weights


def _count_layer(model: ModelConfig) -> LayerParameters:
    hidden, ffn, queries, keys_values = model.hidden, model.ffn_hidden, query_size(model), key_value_size(model)
    branches = 2 if model.gated else 1
    biases = queries + keys_values if model.qkv_bias or model.linear_bias else 0
    if model.linear_bias:
        biases += hidden + branches * ffn + hidden
    return LayerParameters(
        attention=hidden * (queries + keys_values) + queries * hidden,
        mlp=(branches + 1) * hidden * ffn,
        biases=biases,
        norms=2 * norm_size(model) + (2 * norm_size(model, model.head_size) if model.qk_norm else 0),
    )


@dataclass(frozen=True)
class FlopsPerToken:
    """Operations of training on one token, with attention to every key (`full`) and with half of it (`causal`)."""

    full: float
    causal: float


def flops_per_token(model: ModelConfig, seq_length: float) -> FlopsPerToken:
    """Return the operations of training, forward and backward, on one token of a sequence of `seq_length`.

    The head counts without padding rows, whose work is not useful.
    """
    parameters = count_parameters(model)
    matmul = parameters.num_layers * parameters.layer.matmul + model.vocab * model.hidden
    attention = 12 * model.layers * seq_length * query_size(model)
    return FlopsPerToken(full=float(6 * matmul + attention), causal=float(6 * matmul + attention / 2))
