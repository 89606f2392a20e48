"""Which tensors a model has, from its config alone."""

from __future__ import annotations

from collections.abc import Callable

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.mapping import (
    always,
    if_linear_bias,
    if_norm_bias,
    if_qkv_bias,
    if_untied,
    megatron_shape,
)

_OUTSIDE: dict[str, Callable[[ModelConfig], bool]] = {
    "embedding.word_embeddings.weight": always,
    "decoder.final_layernorm.weight": always,
    "decoder.final_layernorm.bias": if_norm_bias,
    "output_layer.weight": if_untied,
}
_IN_LAYER: dict[str, Callable[[ModelConfig], bool]] = {
    "input_layernorm.weight": always,
    "input_layernorm.bias": if_norm_bias,
    "self_attention.linear_qkv.weight": always,
    "self_attention.linear_qkv.bias": if_qkv_bias,
    "self_attention.q_layernorm.weight": lambda model: model.qk_norm,
    "self_attention.k_layernorm.weight": lambda model: model.qk_norm,
    "self_attention.linear_proj.weight": always,
    "self_attention.linear_proj.bias": if_linear_bias,
    "pre_mlp_layernorm.weight": always,
    "pre_mlp_layernorm.bias": if_norm_bias,
    "mlp.linear_fc1.weight": always,
    "mlp.linear_fc1.bias": if_linear_bias,
    "mlp.linear_fc2.weight": always,
    "mlp.linear_fc2.bias": if_linear_bias,
}


def expected_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor by its name in the local layer spec."""
    names = [name for name, has in _OUTSIDE.items() if has(model)]
    for layer in range(model.layers):
        names += [f"decoder.layers.{layer}.{name}" for name, has in _IN_LAYER.items() if has(model)]
    return {name: megatron_shape(name, model) for name in names}
