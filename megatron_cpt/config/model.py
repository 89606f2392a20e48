"""Section `model` of run.yaml: the fields that decide parameters, FLOPs and matching checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_cpt.config.quantities import Section

MAX_LAYERS = 10_000  # lists and checks have an entry per layer
MAX_SIZE = 2**31 - 1  # of a dimension: ids and sizes of tensors are int32 in many kernels


class Activation(StrEnum):
    """Nonlinearity of the MLP."""

    SQUARED_RELU = "squared_relu"
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


class Norm(StrEnum):
    """Normalization before attention and MLP, and after the last layer."""

    LAYERNORM = "layernorm"
    LAYERNORM1P = "layernorm1p"
    RMSNORM = "rmsnorm"


# Names of the same functions in other projects.
ACTIVATION_NAMES = {"relu2": "squared_relu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
GATED_ACTIVATION_NAMES = {"swiglu": "silu", "geglu": "gelu"}
NORM_NAMES = {"layer_norm": "layernorm", "layernorm_1p": "layernorm1p", "rms_norm": "rmsnorm"}


def _normalize(value: Any) -> Any:
    return value.lower().replace("-", "_") if isinstance(value, str) else value


def _member_of(kind: type[StrEnum], other_names: dict[str, str]) -> Callable[[Any], StrEnum]:
    """Return a validator that accepts the members of an enum by their names and by `other_names`."""

    def read(value: Any) -> StrEnum:
        name = _normalize(value)
        name = other_names.get(name, name) if isinstance(name, str) else name
        if name not in list(kind):
            raise ValueError(f"choose one of {', '.join(kind)}")
        return kind(name)

    return read


class RopeScaling(Section):
    """Frequency scaling of rotary embeddings for longer contexts."""

    type: Literal["llama3", "linear"] = "llama3"
    """`llama3` divides low frequencies, as Llama 3.1 does; `linear` divides all (position interpolation)."""
    factor: float = Field(8.0, gt=0)
    """Factor by which the context grows, and by which frequencies are divided."""
    low_freq_factor: float = Field(1.0, gt=0)
    """`llama3`: wavelengths above `original_max_positions` divided by this are scaled by the full factor."""
    high_freq_factor: float = Field(4.0, gt=0)
    """`llama3`: wavelengths below `original_max_positions` divided by this stay unchanged."""
    original_max_positions: int = Field(8192, gt=0, le=MAX_SIZE)
    """`llama3`: context length of pretraining, in tokens."""


class ModelConfig(Section):
    """A GPT decoder. `preset` names a file of these fields; other fields given here override it."""

    preset: str | None = None
    """Preset of fields (nemotron4_15b, llama3_8b, tiny_nemotron, ...); null takes none."""
    layers: int = Field(gt=0, le=MAX_LAYERS)
    """Transformer layers."""
    hidden: int = Field(gt=0, le=MAX_SIZE)
    """Width of the residual stream."""
    ffn_hidden: int = Field(gt=0, le=MAX_SIZE)
    """Width inside the MLP; of one branch in a gated MLP."""
    heads: int = Field(gt=0, le=MAX_SIZE)
    """Query heads."""
    kv_groups: int | None = Field(None, gt=0, le=MAX_SIZE)
    """Key/value groups (GQA); null means one per head."""
    head_dim: int | None = Field(None, gt=0, le=MAX_SIZE)
    """Size of one head; null means hidden / heads."""
    vocab: int = Field(gt=0, le=MAX_SIZE)
    """Token ids of the tokenizer."""
    vocab_multiple: int = Field(128, gt=0, le=MAX_SIZE)
    """Multiple to which the vocabulary is padded; independent of `parallel.tensor`, so checkpoints can be resharded."""
    padding_in_softmax: bool = False
    """Let the rows of this padding take part in the softmax of the loss, as Megatron-LM does; for comparisons only."""
    max_positions: int | None = Field(None, gt=0, le=MAX_SIZE)
    """Longest sequence of pretraining, for conversion and warnings only; null means unknown."""
    activation: Annotated[Activation, BeforeValidator(_member_of(Activation, ACTIVATION_NAMES))] = (
        Activation.SQUARED_RELU
    )
    """Nonlinearity: squared_relu, silu, gelu or gelu_tanh; swiglu and geglu also set `gated`."""
    gated: bool = False
    """Use a gated MLP, activation(gate(x)) * up(x), as SwiGLU does."""
    norm: Annotated[Norm, BeforeValidator(_member_of(Norm, NORM_NAMES))] = Norm.LAYERNORM1P
    """Normalization: layernorm, layernorm1p or rmsnorm; layernorm1p stores w - 1 (zero-centered gamma)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Term added to the variance."""
    rotary_percent: float = Field(1.0, gt=0, le=1)
    """Share of each head that RoPE rotates."""
    rotary_base: float = Field(10000.0, gt=0)
    """Base of the RoPE frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the RoPE frequencies for longer contexts; null does not scale."""
    tied_embeddings: bool = False
    """Share the weights of embedding and output layer."""
    linear_bias: bool = False
    """Use biases in attention output, MLP and the query, key and value projections."""
    qkv_bias: bool = False
    """Use biases in the query, key and value projections; implied by `linear_bias`."""
    qk_norm: bool = False
    """Apply RMSNorm to each query and key head."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of random weights; output projections are scaled by 1 / sqrt(2 layers)."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of attention weights."""
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability before each residual addition and after the embedding."""

    @model_validator(mode="before")
    @classmethod
    def _gated_names(cls, data: Any) -> Any:
        name = _normalize(data.get("activation")) if isinstance(data, dict) else None
        if isinstance(name, str) and name in GATED_ACTIVATION_NAMES:
            return {**data, "activation": GATED_ACTIVATION_NAMES[name], "gated": True}
        return data

    @property
    def num_kv_groups(self) -> int:
        """Key/value groups, with the default filled in."""
        return self.kv_groups or self.heads

    @property
    def head_size(self) -> int:
        """Size of one head, with the default filled in."""
        return self.head_dim or self.hidden // self.heads

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: `vocab` rounded up to `vocab_multiple`."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple
