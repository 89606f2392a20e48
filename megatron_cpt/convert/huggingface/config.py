"""Translation between a Hugging Face config.json and the model section of run.yaml.

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
from megatron_cpt.convert.mapping.families import FAMILIES, Family, detect
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
_HF_ACTIVATIONS = {ACTIVATIONS[name]: name for name in ("relu2", "silu", "gelu", "gelu_pytorch_tanh")}
SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "ffn_hidden",
    "num_attention_heads": "heads",
    "vocab_size": "vocab",
}
"""Key in config.json -> field of the model section."""


def read_model(data: Mapping[str, Any], where: object = "config.json") -> tuple[Family, ModelConfig]:
    """Return the family and the model section for a config.json.

    Raises:
        RefusedError: the model type is not known; or with every key that is missing or malformed, or asks for what
            cannot be computed here.
    """
    family = detect(data, where)
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
    return family, ModelConfig(**fields)


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
    if kind == "linear":
        return {"type": "linear", "factor": config.number("factor", values)}
    if kind != "llama3":
        config.problems.append(f"rope_type: {kind!r}; only default, linear and llama3 can be computed here")
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


def to_hf_config(family: Family, model: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5 read alike.

    Args:
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
        scaling = {"rope_type": model.rope_scaling.type, "factor": model.rope_scaling.factor}
        if model.rope_scaling.type == "llama3":
            scaling |= {
                "low_freq_factor": model.rope_scaling.low_freq_factor,
                "high_freq_factor": model.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": model.rope_scaling.original_max_positions,
            }
        old["rope_scaling"] = scaling
    new = {**scaling, "rope_theta": model.rotary_base}
    if family.has_partial_rope:
        old["partial_rotary_factor"] = new["partial_rotary_factor"] = model.rotary_percent
    return {**old, "rope_parameters": new}
