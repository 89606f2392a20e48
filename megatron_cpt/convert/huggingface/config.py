"""Reading of a Hugging Face config.json as the model section of run.yaml.

Keys that only one family has are handled in its file under `families`. Keys that many families share (sizes, RoPE in
its old and new form, biases, sliding windows) are handled here. Settings that this package cannot compute, such as
other RoPE scalings or quantized weights, are refused and never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_cpt.config import Activation, ModelConfig
from megatron_cpt.convert.huggingface.untrusted_json import HfConfig
from megatron_cpt.convert.mapping.families import Family, detect
from megatron_cpt.errors import RefusedError

ACTIVATIONS = {
    "relu2": Activation.SQUARED_RELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
}
"""`hidden_act` in config.json -> activation."""
SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "ffn_hidden",
    "num_attention_heads": "heads",
    "vocab_size": "vocab",
}
"""Key in config.json -> field of the model section."""


def read_model(config: Mapping[str, Any], where: object = "config.json") -> tuple[Family, ModelConfig]:
    """Return the family and the model section for a config.json.

    Raises:
        RefusedError: the model type is not known, or the model cannot be computed here.
    """
    family = detect(config, where)
    return family, ModelConfig(**to_model_config(family, config, where))


def to_model_config(family: Family, data: Mapping[str, Any], where: object = "config.json") -> dict[str, Any]:
    """Return the fields of the model section for a config.json of this family.

    Raises:
        RefusedError: with every key that is missing or malformed, or asks for what cannot be computed here.
    """
    config = HfConfig(data, family.defaults)
    fields: dict[str, Any] = {field: config.size(key) for key, field in SIZES.items()}
    fields |= {
        "kv_groups": config.optional_size("num_key_value_heads") or fields["heads"],
        "head_dim": config.optional_size("head_dim") or fields["hidden"] // fields["heads"],
        "activation": _activation(config),
        "norm_eps": config.number(family.norm_eps_key),
        "tied_embeddings": config.flag("tie_word_embeddings"),
        "init_std": config.number("initializer_range"),
        "attention_dropout": config.number("attention_dropout"),
        **family.fixed,
        **_biases(family, config),
        **_rope(family, config),
    }
    if (positions := config.optional_size("max_position_embeddings")) is not None:
        fields["max_positions"] = positions
    _refuse_windows_and_quantization(config, fields)
    if family.find_problems is not None:
        config.problems += family.find_problems(data)
    if not config.problems:
        config.problems += _find_impossible_fields(fields)
    if config.problems:
        lines = [f"{where}: this model cannot be converted:", *(f"  - {problem}" for problem in config.problems)]
        raise RefusedError("\n".join(lines))
    return fields


def _activation(config: HfConfig) -> str:
    name = config.get("hidden_act")
    if isinstance(name, str) and name in ACTIVATIONS:
        return ACTIVATIONS[name].value
    config.problems.append(f"hidden_act: {name!r}; known are {', '.join(ACTIVATIONS)}")
    return Activation.SILU.value


def _biases(family: Family, config: HfConfig) -> dict[str, Any]:
    """Return `linear_bias`: megatron-core has one setting for the biases of attention output and MLP."""
    attention, mlp = config.flag("attention_bias"), config.flag("mlp_bias")
    if not family.has_linear_bias:
        if attention:
            config.problems.append(
                "attention_bias: true; Megatron has biases in attention output and MLP together, and MLPs of this "
                "family have none"
            )
        return {}
    if attention != mlp:
        config.problems.append(
            f"attention_bias: {attention} with mlp_bias: {mlp}; Megatron has both or neither (add zero biases)"
        )
    return {"linear_bias": attention and mlp}


def _rope(family: Family, config: HfConfig) -> dict[str, Any]:
    """Return RoPE's fields, from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (older).

    If both exist, the older key wins, as in transformers.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        config.problems.append(f"rope_parameters: {parameters!r}; it must be one flat object for all layers")
        return {}
    values = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")} | parameters
    percent = 1.0 if values["partial_rotary_factor"] is None else config.number("partial_rotary_factor", values)
    if percent != 1.0 and not family.has_partial_rope:
        config.problems.append(f"partial_rotary_factor: {percent}; in this family RoPE rotates whole heads")
    return {
        "rotary_base": config.number("rope_theta", values),
        "rotary_percent": percent,
        "rope_scaling": _rope_scaling(config, values),
    }


def _rope_scaling(config: HfConfig, values: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        config.problems.append(f"rope_type: {kind!r}; only default and llama3 can be computed here")
        return None
    original = values.get("original_max_position_embeddings")
    return {
        "type": "llama3",
        **{key: config.number(key, values) for key in ("factor", "low_freq_factor", "high_freq_factor")},
        "original_max_positions": config.size("max_position_embeddings") if original is None else original,
    }


def _refuse_windows_and_quantization(config: HfConfig, fields: Mapping[str, Any]) -> None:
    window, longest = config.get("sliding_window"), fields.get("max_positions")
    if config.get("use_sliding_window") is False:
        window = None
    if window is not None and not (isinstance(window, int) and longest is not None and window >= longest):
        config.problems.append(
            f"sliding_window: {window!r}; attention here sees all earlier tokens. Up to that length there is no "
            "difference: set it to null in config.json to train with full attention"
        )
    kinds = config.get("layer_types") or []
    if window is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        config.problems.append("layer_types: only models whose layers all have full attention can be converted")
    if config.get("quantization_config") is not None:
        config.problems.append("quantization_config: quantized weights; dequantize and save them as bf16 first")


def _find_impossible_fields(fields: Mapping[str, Any]) -> list[str]:
    try:
        model = ModelConfig(**fields)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['input']!r}: {e['msg']}" for e in error.errors()]
    problems = []
    if model.heads % model.num_kv_groups:
        problems.append(
            f"num_attention_heads: {model.heads} is not a multiple of {model.num_kv_groups} key/value heads"
        )
    rotated = int(model.head_size * model.rotary_percent)
    if rotated % 2 or not rotated:
        problems.append(
            f"head_dim: RoPE rotates pairs of elements, but would rotate {rotated} of {model.head_size} elements per "
            "head, not a positive even number"
        )
    return problems
