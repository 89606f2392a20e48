"""Names of both layer specs, and the rules that tie the Megatron tensors of a model to Hugging Face tensors.

A family's table is a tuple of patterns (patterns.py). `resolve` turns it into the rules for one model, and
`check_tensors` holds a folder against them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.mapping.rules import TensorRule as TensorRule
from megatron_cpt.convert.mapping.shapes import has_tensor
from megatron_cpt.errors import RefusedError

if TYPE_CHECKING:
    from megatron_cpt.convert.mapping.patterns import Pattern

TE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}
"""Ends of names: the local layer spec's -> Transformer Engine's, which fuses a norm into the linear layer after it."""


def te_name(name: str) -> str:
    """A local spec's name as Transformer Engine's spec (and megatron-core's checkpoints) have it."""
    return _swap_end(name, TE_NAMES)


def local_name(name: str) -> str:
    """A Transformer Engine spec's name as the local spec has it."""
    return _swap_end(name, {te: local for local, te in TE_NAMES.items()})


def _swap_end(name: str, ends: Mapping[str, str]) -> str:
    for old, new in ends.items():
        if name.endswith(f".{old}"):
            return name[: -len(old)] + new
    return name


class HasTable(Protocol):
    """What `resolve` needs of a family."""

    @property
    def weights(self) -> Sequence[Pattern]:
        """Its table."""


def resolve(family: HasTable, model: ModelConfig) -> list[TensorRule]:
    """All rules of one model, embedding first, then layer by layer, then the last norm and the output layer."""
    present = [pattern for pattern in family.weights if has_tensor(pattern.megatron, model)]
    outside = [pattern for pattern in present if "*" not in pattern.megatron]
    rules = [pattern.rule(model, None) for pattern in outside if pattern.megatron.startswith("embedding.")]
    for layer in range(model.layers):
        rules += [pattern.rule(model, layer) for pattern in present if "*" in pattern.megatron]
    return rules + [pattern.rule(model, None) for pattern in outside if not pattern.megatron.startswith("embedding.")]


def tied_copies(model: ModelConfig) -> dict[str, str]:
    """Hugging Face names that a tied model's files may repeat -> the tensor they must equal."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.tied_embeddings else {}


def is_derived(name: str) -> bool:
    """Whether a Hugging Face tensor follows from the config (files of 2023 carry RoPE's frequencies)."""
    return name.endswith(".rotary_emb.inv_freq")


WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensors(rules: Iterable[TensorRule], tensors: Mapping[str, Any], model: ModelConfig, where: object) -> None:
    """Hold what a folder has against what the rules need.

    Args:
        rules: of the model.
        tensors: name -> anything with `shape` and `dtype`, e.g. `HfFolder.tensors`.
        model: its config.
        where: for the message.

    Raises:
        RefusedError: naming every tensor that is missing, too many, of another shape or not of floating point.
    """
    expected = {name: shape for rule in rules for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)}
    repeated = {name: expected[original] for name, original in tied_copies(model).items()}
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        shape = expected.get(name) or repeated.get(name)
        if shape is None:
            problems += [] if is_derived(name) else [f"{name}: not a tensor of this model"]
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name}: shape {tuple(tensor.shape)}, but config.json makes it {shape}")
        elif tensor.dtype not in WEIGHT_DTYPES:
            problems.append(f"{name}: {tensor.dtype}; weights are read as fp32, bf16 or fp16 (dequantize it first)")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise RefusedError("\n".join([f"{where}: {len(problems)} tensors do not fit:", *(f"  - {p}" for p in shown)]))
