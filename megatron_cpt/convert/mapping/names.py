"""Names of Megatron's tensors, which differ between its layer specs and its checkpoints.

The package uses the names of the local layer spec, one per tensor and layer. For the norm before the attention of
layer 3:

    decoder.layers.3.input_layernorm.weight                             local spec
    decoder.layers.3.self_attention.linear_qkv.layer_norm_weight        Transformer Engine's spec
    decoder.layers.self_attention.linear_qkv.layer_norm_weight, row 3   torch_dist checkpoint, all layers stacked
"""

from __future__ import annotations

import re
from collections.abc import Mapping

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

TE_SUFFIXES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}
"""Local spec's suffix -> Transformer Engine's, which fuses a norm into the linear layer that follows it."""

LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
"""Number of the layer, and the name inside the layer."""

_OPTIMIZER_TENSOR = re.compile(r"(optimizer\.state\.\w+\.)(.+)")


def te_name(name: str) -> str:
    """Return the name in Transformer Engine's layer spec for a name in the local spec."""
    return _replace_suffix(name, TE_SUFFIXES)


def local_name(name: str) -> str:
    """Return the name in the local layer spec for a name in Transformer Engine's spec."""
    return _replace_suffix(name, {te: local for local, te in TE_SUFFIXES.items()})


def stored_name(name: str) -> tuple[str, int | None]:
    """Return the key of a tensor in a torch_dist checkpoint, and its index along the stacked layers.

    The index is None for tensors outside the layers, such as the embedding.
    """
    weight = weight_name(name)
    prefix = name.removesuffix(weight)
    match = LAYER_NAME.fullmatch(te_name(weight))
    return (f"{prefix}decoder.layers.{match[2]}", int(match[1])) if match else (name, None)


def optimizer_prefix(kind: str) -> str:
    """Return what precedes a weight's name in the names of its moments (`exp_avg`) and its master weight (`param`)."""
    return f"optimizer.state.{kind}."


def weight_name(name: str) -> str:
    """Return the weight that a tensor of the optimizer belongs to; the name of a weight is unchanged."""
    match = _OPTIMIZER_TENSOR.fullmatch(name)
    return match[2] if match else name


def is_optimizer_tensor(name: str) -> bool:
    """Return whether a tensor is a moment or a master weight."""
    return weight_name(name) != name


def _replace_suffix(name: str, suffixes: Mapping[str, str]) -> str:
    for old, new in suffixes.items():
        if name.endswith(f".{old}"):
            return name[: -len(old)] + new
    return name
