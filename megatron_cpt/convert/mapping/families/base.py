"""What a model family is: a few facts about its config.json and a table of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_cpt.config import Activation
from megatron_cpt.convert.mapping.patterns import Pattern


def refuse_nothing(_: Mapping[str, Any]) -> list[str]:
    """For families without traps of their own."""
    return []


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share a table of weights and the meaning of a config.json.

    Attributes:
        name: as the command line has it.
        model_type: of config.json.
        architecture: class in transformers.
        weights: the table.
        fixed: fields of `ModelConfig` that are the same in every model of the family.
        activations: those the family's models are made with.
        defaults: of transformers' config class, for keys that a config.json may leave out.
        norm_eps_key: how config.json calls the norms' epsilon.
        has_linear_bias: whether config.json can ask for biases in all linear layers.
        has_partial_rope: whether RoPE may turn a part of each head.
        extra: keys that config.json must have beside the model's shape.
        mark: a key of config.json that tells the family from another of the same `model_type`.
        refuse: problems of a config.json that only this family knows.
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
    refuse: Callable[[Mapping[str, Any]], list[str]] = refuse_nothing


COMMON_DEFAULTS = {
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""What the config classes of transformers agree on."""
