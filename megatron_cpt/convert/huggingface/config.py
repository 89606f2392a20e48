"""config.json of a Hugging Face folder <-> the model section of run.yaml.

What a family has in its own way stands in its file under families/; sizes, RoPE in its old and new form, biases and
sliding windows are read and written here for all of them. A config.json is not trusted: types are checked, and what the
model here cannot compute (other RoPE scalings, windows, quantized weights) is refused, not dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_cpt.config import Activation, ModelConfig
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
_HF_ACTIVATIONS = {ACTIVATIONS[name]: name for name in ("relu2", "silu", "gelu", "gelu_pytorch_tanh")}

_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "ffn_hidden",
    "num_attention_heads": "heads",
    "vocab_size": "vocab",
}
_LARGEST_SIZE = 1 << 31  # of anything a config.json may ask for; a lie beyond it would overflow shapes later


class HfConfig:
    """A config.json with the defaults of its family, read key by key with checks of type.

    `problems` collects what cannot be used; the values returned in their place only keep the reading going.
    """

    def __init__(self, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._data = {**defaults, **data}
        self.problems: list[str] = []

    def size(self, key: str) -> int:
        """A positive whole number that must be there."""
        value = self._data.get(key)
        if type(value) is int and 0 < value < _LARGEST_SIZE:
            return value
        self.problems.append(f"{key}: {value!r}; it must be a positive whole number")
        return 1

    def optional_size(self, key: str) -> int | None:
        """A positive whole number, or None where it is null or left out."""
        return None if self._data.get(key) is None else self.size(key)

    def number(self, key: str, within: Mapping[str, Any] | None = None) -> float:
        """A number that must be there, in the config or in an object inside it."""
        value = (self._data if within is None else within).get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        self.problems.append(f"{key}: {value!r}; it must be a number")
        return 1.0

    def flag(self, key: str) -> bool:
        """true or false; false where it is null or left out."""
        value = self._data.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problems.append(f"{key}: {value!r}; it must be true or false")
        return False

    def get(self, key: str) -> Any:
        """Whatever is there, or None."""
        return self._data.get(key)


def to_model_config(family: Family, data: Mapping[str, Any], where: object = "config.json") -> dict[str, Any]:
    """The model section of run.yaml for a config.json of this family.

    Raises:
        RefusedError: with every problem: a key is missing or malformed, or asks for what cannot be computed here.
    """
    config = HfConfig(data, family.defaults)
    fields: dict[str, Any] = {ours: config.size(theirs) for theirs, ours in _SIZES.items()}
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
    _refuse_others(config, fields)
    config.problems += family.refuse(data)
    if not config.problems:
        config.problems += _model_problems(fields)
    if config.problems:
        raise RefusedError("\n".join([f"{where}: this model cannot be read:", *(f"  - {p}" for p in config.problems)]))
    return fields


def _activation(config: HfConfig) -> str:
    name = config.get("hidden_act")
    if isinstance(name, str) and name in ACTIVATIONS:
        return ACTIVATIONS[name].value
    config.problems.append(f"hidden_act: {name!r}; known are {', '.join(ACTIVATIONS)}")
    return Activation.SILU.value


def _biases(family: Family, config: HfConfig) -> dict[str, Any]:
    attention, mlp = config.flag("attention_bias"), config.flag("mlp_bias")
    if not family.has_linear_bias:
        # the family's MLP has no biases, and megatron-core has one switch for both
        if attention:
            config.problems.append("attention_bias: true; Megatron has biases in attention output and MLP together")
        return {}
    if attention != mlp:
        config.problems.append(
            f"attention_bias: {attention} with mlp_bias: {mlp}; Megatron has both or neither (add zero biases)"
        )
    return {"linear_bias": attention and mlp}


def _rope(family: Family, config: HfConfig) -> dict[str, Any]:
    """RoPE from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before).

    Where both are there, the old key wins as it does in transformers.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        config.problems.append(f"rope_parameters: {parameters!r}; one flat object for all layers is understood")
        return {}
    values = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")} | parameters
    percent = 1.0 if values["partial_rotary_factor"] is None else config.number("partial_rotary_factor", values)
    if percent != 1.0 and not family.has_partial_rope:
        config.problems.append(f"partial_rotary_factor: {percent}; models of this family turn whole heads")
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
        config.problems.append(f"rope_type: {kind!r}; only default and llama3 are computed here")
        return None
    original = values.get("original_max_position_embeddings")
    return {
        "type": "llama3",
        **{key: config.number(key, values) for key in ("factor", "low_freq_factor", "high_freq_factor")},
        "original_max_positions": config.size("max_position_embeddings") if original is None else original,
    }


def _refuse_others(config: HfConfig, fields: Mapping[str, Any]) -> None:
    """Attention over a window, weights in another number format."""
    window, longest = config.get("sliding_window"), fields.get("max_positions")
    if config.get("use_sliding_window") is False:
        window = None
    if window is not None and not (isinstance(window, int) and longest is not None and window >= longest):
        config.problems.append(
            f"sliding_window: {window!r}; attention here reaches back to the start. Up to that length there is no "
            "difference: set it to null in config.json to train with full attention"
        )
    kinds = config.get("layer_types") or []
    if window is not None and not (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)):
        config.problems.append("layer_types: layers of one kind are understood, with full attention")
    if config.get("quantization_config") is not None:
        config.problems.append("quantization_config: quantized weights; dequantize and save them as bf16 first")


def _model_problems(fields: Mapping[str, Any]) -> list[str]:
    """What the fields say that no model can have."""
    try:
        model = ModelConfig(**fields)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['input']!r}: {e['msg']}" for e in error.errors()]
    problems = []
    if model.heads % model.num_kv_groups:
        problems.append(
            f"num_attention_heads: {model.heads} is not a multiple of {model.num_kv_groups} key/value heads"
        )
    if rotary_size(model) % 2 or not rotary_size(model):
        problems.append(f"head_dim: RoPE turns pairs, and {rotary_size(model)} of {model.head_size} is no even number")
    return problems


def rotary_size(model: ModelConfig) -> int:
    """How many numbers of each head RoPE turns."""
    return int(model.head_size * model.rotary_percent)


def to_hf_config(family: Family, model: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read alike.

    Args:
        family: must be able to express the model.
        model: the shape.
        dtype: of the weights: float32, bfloat16 or float16.

    Raises:
        RefusedError: with every field that this family cannot express.
    """
    problems = model_problems(family, model)
    if problems:
        raise RefusedError("\n".join([f"model: not a {family.name} model:", *(f"  - {p}" for p in problems)]))
    config: dict[str, Any] = {theirs: getattr(model, ours) for theirs, ours in _SIZES.items()}
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


def _hf_rope(family: Family, model: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for transformers 4, `rope_parameters` for 5."""
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


def model_problems(family: Family, model: ModelConfig) -> list[str]:
    """Why a model is not of this family, one line a field; empty where it is."""
    plain = model.model_dump(mode="json")
    problems = [
        f"{field}: {plain[field]!r}; {family.name} models have {value!r}"
        for field, value in family.fixed.items()
        if plain[field] != value
    ]
    if model.linear_bias and not family.has_linear_bias:
        problems.append(f"linear_bias: {family.name} models have none")
    if model.rotary_percent != 1.0 and not family.has_partial_rope:
        problems.append(f"rotary_percent: {model.rotary_percent}; {family.name} models turn whole heads")
    if model.activation not in family.activations:
        problems.append(f"activation: {model.activation.value}; {family.name} models have another")
    return problems


def matching(model: ModelConfig) -> list[Family]:
    """The families that can express a model, e.g. one that was trained from random weights."""
    return [family for family in FAMILIES.values() if not model_problems(family, model)]


def read_model(config: Mapping[str, Any], where: object = "config.json") -> tuple[Family, ModelConfig]:
    """Family and shape of a config.json.

    Raises:
        RefusedError: it is not known, or asks for what cannot be computed here.
    """
    family = detect(config, where)
    return family, ModelConfig(**to_model_config(family, config, where))
