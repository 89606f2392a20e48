"""Model family: a few facts about its config.json, and a table of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_cpt.config import Activation
from megatron_cpt.convert.mapping.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share a table of weights and the meaning of the keys in config.json.

    Attributes:
        name: name on the command line.
        model_type: `model_type` in config.json.
        architecture: class of the model in transformers.
        weights: table of the weights. A line whose tensor a model lacks (a bias, an output layer) is skipped.
        fixed: fields of `ModelConfig` that all models of the family share.
        activations: activations that transformers' class supports.
        defaults: values that transformers' config class takes for keys that are missing in config.json.
        norm_eps_key: key of config.json with the epsilon of the norms.
        has_linear_bias: whether config.json can ask for biases in all linear layers.
        has_partial_rope: whether RoPE may rotate only a part of each head.
        extra: keys that an exported config.json has besides the model's shape.
        mark: key of config.json that distinguishes this family from another one with this `model_type`.
        find_problems: returns why a config.json of this family cannot be used, for reasons that no other family has.
    """

    name: str
    model_type: str
    architecture: str
    weights: tuple[Pattern, ...]
    fixed: Mapping[str, Any]
    activations: tuple[Activation, ...] = tuple(Activation)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm_eps_key: str = "rms_norm_eps"
    has_linear_bias: bool = False
    has_partial_rope: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    mark: str | None = None
    find_problems: Callable[[Mapping[str, Any]], list[str]] | None = None


COMMON_DEFAULTS = {
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""Defaults that most config classes of transformers share."""
