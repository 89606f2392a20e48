"""The tensors of a whole model, from its config alone: which it has, and their shapes.

Tensors are global (before tensor parallelism cuts them) and have the names of the local layer spec, `*` for the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_cpt.config import ModelConfig, Norm

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")


def _always(_: ModelConfig) -> bool:
    return True


def _is_untied(model: ModelConfig) -> bool:
    return not model.tied_embeddings


def _has_linear_bias(model: ModelConfig) -> bool:
    return model.linear_bias


def _has_qkv_bias(model: ModelConfig) -> bool:
    return model.qkv_bias or model.linear_bias


def _has_norm_bias(model: ModelConfig) -> bool:
    return model.norm is not Norm.RMSNORM


def _has_qk_norm(model: ModelConfig) -> bool:
    return model.qk_norm


def _qkv_rows(model: ModelConfig) -> int:
    return (model.heads + 2 * model.num_kv_groups) * model.head_size


def _fc1_rows(model: ModelConfig) -> int:
    return model.ffn_hidden * (2 if model.gated else 1)


@dataclass(frozen=True)
class _Expected:
    """A tensor of a model: its shape, and which models have it."""

    shape: Callable[[ModelConfig], tuple[int, ...]]
    when: Callable[[ModelConfig], bool] = _always


_ATTENTION, _MLP = "decoder.layers.*.self_attention", "decoder.layers.*.mlp"
_TENSORS = {
    "embedding.word_embeddings.weight": _Expected(lambda m: (m.padded_vocab, m.hidden)),
    "decoder.layers.*.input_layernorm.weight": _Expected(lambda m: (m.hidden,)),
    "decoder.layers.*.input_layernorm.bias": _Expected(lambda m: (m.hidden,), _has_norm_bias),
    f"{_ATTENTION}.linear_qkv.weight": _Expected(lambda m: (_qkv_rows(m), m.hidden)),
    f"{_ATTENTION}.linear_qkv.bias": _Expected(lambda m: (_qkv_rows(m),), _has_qkv_bias),
    f"{_ATTENTION}.q_layernorm.weight": _Expected(lambda m: (m.head_size,), _has_qk_norm),
    f"{_ATTENTION}.k_layernorm.weight": _Expected(lambda m: (m.head_size,), _has_qk_norm),
    f"{_ATTENTION}.linear_proj.weight": _Expected(lambda m: (m.hidden, m.heads * m.head_size)),
    f"{_ATTENTION}.linear_proj.bias": _Expected(lambda m: (m.hidden,), _has_linear_bias),
    "decoder.layers.*.pre_mlp_layernorm.weight": _Expected(lambda m: (m.hidden,)),
    "decoder.layers.*.pre_mlp_layernorm.bias": _Expected(lambda m: (m.hidden,), _has_norm_bias),
    f"{_MLP}.linear_fc1.weight": _Expected(lambda m: (_fc1_rows(m), m.hidden)),
    f"{_MLP}.linear_fc1.bias": _Expected(lambda m: (_fc1_rows(m),), _has_linear_bias),
    f"{_MLP}.linear_fc2.weight": _Expected(lambda m: (m.hidden, m.ffn_hidden)),
    f"{_MLP}.linear_fc2.bias": _Expected(lambda m: (m.hidden,), _has_linear_bias),
    "decoder.final_layernorm.weight": _Expected(lambda m: (m.hidden,)),
    "decoder.final_layernorm.bias": _Expected(lambda m: (m.hidden,), _has_norm_bias),
    "output_layer.weight": _Expected(lambda m: (m.padded_vocab, m.hidden), _is_untied),
}


def megatron_shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    """Shape of a tensor, by its name with a layer's number or `*`."""
    return _TENSORS[_LAYER.sub("*", name)].shape(model)


def has_tensor(name: str, model: ModelConfig) -> bool:
    """Whether a model has a tensor, by its name with a layer's number or `*`."""
    return _TENSORS[_LAYER.sub("*", name)].when(model)


def expected_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor by its name."""
    shapes = {name: tensor.shape(model) for name, tensor in _TENSORS.items() if tensor.when(model)}
    found = {name: shape for name, shape in shapes.items() if "*" not in name}
    for layer in range(model.layers):
        found |= {name.replace("*", str(layer)): shape for name, shape in shapes.items() if "*" in name}
    return found
