"""Rules for all tensors of one model, made from its family's table, and the check that a source has these tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.mapping.families.base import Family
from megatron_cpt.convert.mapping.rules import TensorRule
from megatron_cpt.convert.mapping.shapes import shape_table
from megatron_cpt.errors import RefusedError

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_SHOWN = 20


def resolve(family: Family, model: ModelConfig) -> list[TensorRule]:
    """Return the rules of one model: embedding, layer by layer, final norm, output layer.

    Lines of the table whose tensor the model lacks are skipped. Example: a Llama of 2 layers without biases has
    15 rules. Per layer they are linear_qkv, linear_proj, linear_fc1, linear_fc2 and two norms; outside the layers they
    are embedding, final norm and output layer.
    """
    shapes = shape_table(model)
    rules = [pattern.rule(model, shapes[pattern.megatron]) for pattern in family.weights if pattern.megatron in shapes]

    def starting_with(prefix: str) -> list[TensorRule]:
        return [rule for rule in rules if rule.megatron.startswith(prefix)]

    in_layers = [rule.in_layer(layer) for layer in range(model.layers) for rule in starting_with("decoder.layers.")]
    return [
        *starting_with("embedding."),
        *in_layers,
        *starting_with("decoder.final_layernorm."),
        *starting_with("output_layer."),
    ]


def tied_copies(model: ModelConfig) -> dict[str, str]:
    """Return Hugging Face names that a tied model's files may repeat -> the tensor that each must equal."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.tied_embeddings else {}


def check_hf_tensors(
    rules: Iterable[TensorRule], tensors: Mapping[str, Any], model: ModelConfig, where: object
) -> None:
    """Compare the tensors of a Hugging Face folder, such as `HfFolder.tensors`, with the tensors that the rules need.

    Raises:
        RefusedError: a tensor is missing, unknown, of another shape, or not of a floating-point type that is read here.
    """
    expected = {name: shape for rule in rules for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)}
    optional = {name: expected[original] for name, original in tied_copies(model).items()}
    # RoPE's frequencies follow from config.json; files of 2023 carry them anyway
    known = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    refuse_wrong_tensors(where, known, expected, optional)


def refuse_wrong_tensors(
    where: object,
    tensors: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
    padded: Iterable[str] = (),
) -> None:
    """Raise unless a source has exactly the tensors of its model.

    Args:
        tensors: name -> anything with `shape` and `dtype`.
        optional: shapes of tensors that may exist besides.
        padded: names whose number of rows may differ, because another program padded the vocabulary differently.

    Raises:
        RefusedError: with every tensor that is wrong, at most 20 of them by name.
    """
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    allowed = {**(optional or {}), **expected}
    for name, tensor in tensors.items():
        shape, found = allowed.get(name), tuple(tensor.shape)
        if shape is None:
            problems.append(f"{name}: not a tensor of this model")
        elif found[1:] != shape[1:] or (found[:1] != shape[:1] and name not in padded):
            problems.append(f"{name}: shape {found}, but the model's config makes it {shape}")
        elif tensor.dtype not in WEIGHT_DTYPES:
            problems.append(
                f"{name}: {tensor.dtype}; weights are read as fp32, bf16 or fp16; dequantize or cast it first"
            )
    if problems:
        shown = problems[:_MAX_SHOWN]
        if len(problems) > _MAX_SHOWN:
            shown.append(f"and {len(problems) - _MAX_SHOWN} more")
        lines = [f"{where}: {len(problems)} tensors do not fit the model:", *(f"  - {problem}" for problem in shown)]
        raise RefusedError("\n".join(lines))
