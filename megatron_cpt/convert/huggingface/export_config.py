"""Writing of a Hugging Face config.json for a model, and the choice of a family that can express it."""

from __future__ import annotations

from typing import Any

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.huggingface.config import ACTIVATIONS, SIZES
from megatron_cpt.convert.mapping.families import FAMILIES, Family
from megatron_cpt.errors import RefusedError

_HF_ACTIVATIONS = {ACTIVATIONS[name]: name for name in ("relu2", "silu", "gelu", "gelu_pytorch_tanh")}


def to_hf_config(family: Family, model: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5 read alike.

    Args:
        family: family that can express the model.
        model: model section.
        dtype: dtype of the weights: float32, bfloat16 or float16.

    Raises:
        RefusedError: with every field that this family cannot express.
    """
    problems = find_differences(family, model)
    if problems:
        lines = [f"model: not a {family.name} model:", *(f"  - {problem}" for problem in problems)]
        raise RefusedError("\n".join(lines))
    config: dict[str, Any] = {key: getattr(model, field) for key, field in SIZES.items()}
    config |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_key_value_heads": model.num_kv_groups,
        "head_dim": model.head_size,
        "hidden_act": _HF_ACTIVATIONS[model.activation],
        family.norm_eps_key: model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "attention_dropout": model.attention_dropout,
        "torch_dtype": dtype,
        **_hf_rope(family, model),
        **family.extra,
    }
    if model.max_positions is not None:
        config["max_position_embeddings"] = model.max_positions
    if family.has_linear_bias:
        config |= {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}
    return config


def matching(model: ModelConfig) -> list[Family]:
    """Return the families that can express a model."""
    return [family for family in FAMILIES.values() if not find_differences(family, model)]


def find_differences(family: Family, model: ModelConfig) -> list[str]:
    """Return the reasons why a family cannot express a model, one line per field."""
    plain = model.model_dump(mode="json")
    problems = [
        f"{field}: {plain[field]!r}; {family.name} models have {value!r}"
        for field, value in family.fixed.items()
        if plain[field] != value
    ]
    if model.linear_bias and not family.has_linear_bias:
        problems.append(f"linear_bias: true; {family.name} models have no such biases")
    if model.rotary_percent != 1.0 and not family.has_partial_rope:
        problems.append(f"rotary_percent: {model.rotary_percent}; in {family.name} models RoPE rotates whole heads")
    if model.activation not in family.activations:
        known = ", ".join(activation.value for activation in family.activations)
        problems.append(f"activation: {model.activation.value}; {family.name} models have one of {known}")
    return problems


def _hf_rope(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` for transformers 4, and `rope_parameters` for transformers 5."""
    old: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_scaling.factor,
            "low_freq_factor": model.rope_scaling.low_freq_factor,
            "high_freq_factor": model.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": model.rope_scaling.original_max_positions,
        }
        old["rope_scaling"] = scaling
    new = {**scaling, "rope_theta": model.rotary_base}
    if family.has_partial_rope:
        old["partial_rotary_factor"] = new["partial_rotary_factor"] = model.rotary_percent
    return {**old, "rope_parameters": new}
