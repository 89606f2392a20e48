"""The shape of the model: what decides parameters, FLOPs and which checkpoint fits."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_cpt.config.section import Section


class Activation(StrEnum):
    """The nonlinearity of the MLP."""

    SQUARED_RELU = "squared_relu"
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


class Norm(StrEnum):
    """The normalization before attention and MLP, and at the end."""

    LAYERNORM = "layernorm"
    LAYERNORM1P = "layernorm1p"
    RMSNORM = "rmsnorm"


# What other projects call the same things.
ACTIVATION_NAMES = {"relu2": "squared_relu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
GATED_ACTIVATION_NAMES = {"swiglu": "silu", "geglu": "gelu"}
NORM_NAMES = {"layer_norm": "layernorm", "layernorm_1p": "layernorm1p", "rms_norm": "rmsnorm"}


def _plain(value: Any) -> Any:
    return value.lower().replace("-", "_") if isinstance(value, str) else value


def _member_of(kind: type[StrEnum], other_names: dict[str, str]) -> Callable[[Any], StrEnum]:
    """Reads a member by its own name or another one."""

    def read(value: Any) -> StrEnum:
        name = _plain(value)
        name = other_names.get(name, name) if isinstance(name, str) else name
        if name not in list(kind):
            raise ValueError(f"choose one of {', '.join(kind)}")
        return kind(name)

    return read


class RopeScaling(Section):
    """Frequency scaling of rotary embeddings as Llama 3.1 defines it."""

    type: Literal["llama3"] = "llama3"
    factor: float = Field(8.0, gt=0)
    """How much longer the context becomes."""
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_positions: int = Field(8192, gt=0)


class ModelConfig(Section):
    """A GPT decoder. `preset` names a file of these fields; fields beside it win."""

    preset: str | None = None
    """The preset that the other fields came from (nemotron4_15b, llama3_8b, tiny_nemotron, ...)."""
    layers: int = Field(gt=0)
    """Number of transformer layers."""
    hidden: int = Field(gt=0)
    """Width of the residual stream."""
    ffn_hidden: int = Field(gt=0)
    """Width inside the MLP (of one branch where it is gated)."""
    heads: int = Field(gt=0)
    """Number of query heads."""
    kv_groups: int | None = Field(None, gt=0)
    """Number of key/value groups (GQA); left out: one for each head."""
    head_dim: int | None = Field(None, gt=0)
    """Size of one head; left out: hidden / heads."""
    vocab: int = Field(gt=0)
    """Number of token ids of the tokenizer."""
    vocab_multiple: int = Field(128, gt=0)
    """The embedding is padded to a multiple of this, whatever the tensor-parallel size, so that checkpoints reshape."""
    max_positions: int | None = Field(None, gt=0)
    """Longest sequence the model was made for; a note for conversion, RoPE itself has no limit."""
    activation: Annotated[Activation, BeforeValidator(_member_of(Activation, ACTIVATION_NAMES))] = (
        Activation.SQUARED_RELU
    )
    gated: bool = False
    """Gated MLP: activation(gate(x)) * up(x), as in SwiGLU."""
    norm: Annotated[Norm, BeforeValidator(_member_of(Norm, NORM_NAMES))] = Norm.LAYERNORM1P
    """layernorm1p stores w - 1 (zero-centered gamma)."""
    norm_eps: float = Field(1e-5, gt=0)
    rotary_percent: float = Field(1.0, gt=0, le=1)
    """Share of each head that RoPE turns."""
    rotary_base: float = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    """The output layer shares the weights of the embedding."""
    linear_bias: bool = False
    """Biases in attention output and MLP."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections (also on with linear_bias)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of random weights; output projections are scaled by 1 / sqrt(2 layers)."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    hidden_dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _gated_names(cls, data: Any) -> Any:
        name = _plain(data.get("activation")) if isinstance(data, dict) else None
        if isinstance(name, str) and name in GATED_ACTIVATION_NAMES:
            return {**data, "activation": GATED_ACTIVATION_NAMES[name], "gated": True}
        return data

    @property
    def num_kv_groups(self) -> int:
        """Key/value groups, resolved."""
        return self.kv_groups or self.heads

    @property
    def head_size(self) -> int:
        """Size of one head, resolved."""
        return self.head_dim or self.hidden // self.heads

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: `vocab` rounded up to `vocab_multiple`."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple
