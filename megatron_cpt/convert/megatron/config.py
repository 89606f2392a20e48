"""Model section for a Megatron checkpoint, from the config stored with it or from the user.

Our checkpoints have a run.yaml. Megatron-LM stores its arguments (`args` in common.pt or model_optim_rng.pt),
Megatron-Bridge a run_config.yaml (whose model builders nest a `transformer` section), NeMo 2 a context/model.yaml. All
have the fields of megatron-core's TransformerConfig. They are read as plain values, and no Python object is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_cpt.checkpoint.layout import RUN_FILE, STATE_FILE
from megatron_cpt.config import ModelConfig, preset_names, read_mapping
from megatron_cpt.config.presets import preset
from megatron_cpt.convert.mapping.names import EMBEDDING, OUTPUT_LAYER
from megatron_cpt.convert.mapping.tensors import MosaicWeights
from megatron_cpt.convert.megatron.torch_dist_reader import newest_iteration
from megatron_cpt.errors import RefusedError, UserError

_CONFIG_FILES = ("run_config.yaml", "../run_config.yaml", "context/model.yaml", "../context/model.yaml")
_SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn_hidden",
    "num_attention_heads": "heads",
    "kv_channels": "head_dim",
}
_OPTIONAL = {
    "norm_epsilon": "norm_eps",
    "layernorm_epsilon": "norm_eps",
    "rotary_percent": "rotary_percent",
    "rotary_base": "rotary_base",
    "max_position_embeddings": "max_positions",
    "init_method_std": "init_std",
    "qk_layernorm": "qk_norm",
    "add_qkv_bias": "qkv_bias",
    "add_bias_linear": "linear_bias",
}
# Arguments that change the computation without a trace in the tensors; a model that sets one is refused.
_UNSUPPORTED = (
    "rotary_interleaved",
    "apply_residual_connection_post_layernorm",
    "no_rope_freq",
    "softmax_scale",
    "qk_l2_norm",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "use_mup",
)
# Names of functions in megatron-core, torch and NeMo 2, and short names that Megatron-Bridge writes.
_ACTIVATIONS = {
    "squared_relu": "squared_relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "gelu": "gelu",
    "fast_gelu": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "openai_gelu": "gelu_tanh",
}


def read_megatron_model(
    path: Path, weights: MosaicWeights, common: Mapping[str, Any], named_model: str | None
) -> ModelConfig:
    """Return the model section of a checkpoint.

    Args:
        common: entries besides the tensors.
        named_model: a preset or a YAML file with a model section; it has precedence over the stored config.

    Raises:
        UserError: the checkpoint has no config, or `named_model` does not exist.
        RefusedError: the config describes a model that cannot be trained here.
    """
    if named_model is not None:
        return _named_model(named_model)
    if (path / STATE_FILE).is_file() and (path / RUN_FILE).is_file():
        return _model_of_run(read_mapping(path / RUN_FILE), path / RUN_FILE)
    arguments = common.get("args")
    fields = arguments if isinstance(arguments, Mapping) else getattr(arguments, "state", None)
    where: object = f"{path}: args"
    if not isinstance(fields, Mapping):
        where, fields = _find_config(path)
    return _validate(model_fields(fields, weights, where), where)


def _model_of_run(run: Mapping[str, Any], where: Path) -> ModelConfig:
    """Return the model of a run.yaml; a run on longer sequences than `max_positions` has extended it."""
    model = _validate(run.get("model"), where)
    phases = run.get("phases") or []
    lengths = [run.get("seq_length"), *(phase.get("seq_length") for phase in phases if isinstance(phase, Mapping))]
    longest = max((length for length in lengths if isinstance(length, int)), default=0)
    if model.max_positions is None or model.max_positions >= longest:
        return model
    return model.model_copy(update={"max_positions": longest})


def _named_model(name: str) -> ModelConfig:
    if name in preset_names():
        return ModelConfig.model_validate({"preset": name, **preset(name)})
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--model {name}: neither a file nor a preset; known presets are {', '.join(preset_names())}")
    fields = read_mapping(path)
    return _validate(fields.get("model", fields), path)


def _validate(fields: Any, where: object) -> ModelConfig:
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RefusedError(
            f"{where}: this model cannot be converted: {problems}; correct it, or name the model: --model"
        ) from error


def _find_config(path: Path) -> tuple[Path, Mapping[str, Any]]:
    folders = [folder for folder in (newest_iteration(path), path) if folder is not None]
    for file in (folder / name for folder in folders for name in _CONFIG_FILES):
        if file.is_file():
            try:
                data = read_mapping(file, schema="untagged")
            except UserError as error:
                raise RefusedError(f"{error}; name the model instead: --model FILE.yaml") from error
            for key in ("model", "config", "transformer"):
                if isinstance(data.get(key), Mapping):
                    data = {**data, **data[key]}
            return file, data
    raise UserError(f"{path}: stores no config, so its model is unknown; name it: --model PRESET or --model FILE.yaml")


def model_fields(fields: Mapping[str, Any], weights: MosaicWeights, where: object) -> dict[str, Any]:
    """Return the model section for arguments of Megatron-LM or fields of TransformerConfig.

    Args:
        weights: tensors, which show the padded vocabulary and whether embeddings are tied.

    Raises:
        RefusedError: a size is missing, or the model has parts that are not supported here.
    """
    if EMBEDDING not in weights.tensors:
        raise RefusedError(
            f"{where}: the checkpoint has no {EMBEDDING}, so it is not a complete GPT model; copy all of its files"
        )
    _refuse_unsupported(fields, where)
    missing = [name for name in _SIZES if name != "kv_channels" and not isinstance(fields.get(name), int)]
    if missing:
        raise RefusedError(f"{where}: {', '.join(missing)}: missing; name the model: --model FILE.yaml")
    found = {field: fields[name] for name, field in (_SIZES | _OPTIONAL).items() if fields.get(name) is not None}
    if "max_positions" not in found and fields.get("seq_length") is not None:
        found["max_positions"] = fields["seq_length"]
    rows = weights.tensors[EMBEDDING].shape[0]
    vocab = fields.get("vocab_size")
    is_grouped = fields.get("group_query_attention", True)  # Megatron-LM ignores num_query_groups without it
    return {
        **found,
        "kv_groups": (fields.get("num_query_groups") if is_grouped else None) or found["heads"],
        "vocab": vocab if isinstance(vocab, int) and 0 < vocab <= rows else rows,
        "gated": bool(fields.get("swiglu") or fields.get("gated_linear_unit")),
        "activation": _activation(fields, where),
        "norm": _norm(fields),
        "tied_embeddings": OUTPUT_LAYER not in weights.tensors,
        **_rope_scaling(fields),
    }


def _activation(fields: Mapping[str, Any], where: object) -> str:
    if fields.get("squared_relu"):
        return "squared_relu"
    if fields.get("swiglu"):
        return "silu"
    function = fields.get("activation_func")
    name = str(function.get("_target_") if isinstance(function, Mapping) else function).rpartition(".")[2]
    if function is None and "add_bias_linear" in fields:
        return "gelu"  # default of Megatron-LM
    if name not in _ACTIVATIONS:
        raise RefusedError(f"{where}: activation_func {function!r} is not known; name the model: --model FILE.yaml")
    return _ACTIVATIONS[name]


def _norm(fields: Mapping[str, Any]) -> str:
    if fields.get("normalization") == "RMSNorm":
        return "rmsnorm"
    zero_centered = fields.get("apply_layernorm_1p") or fields.get("layernorm_zero_centered_gamma")
    return "layernorm1p" if zero_centered else "layernorm"


def _rope_scaling(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("old_context_len"):  # NeMo 2, which computes Llama 3.1's RoPE scaling itself
        factors = {"factor": "scale_factor", "original_max_positions": "old_context_len"}
        factors |= {name: name for name in ("low_freq_factor", "high_freq_factor")}
        return {"rope_scaling": {field: fields[name] for field, name in factors.items() if name in fields}}
    for name in ("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"):  # Megatron-LM, Megatron-Bridge
        if fields.get(name) not in (None, 1, 1.0):
            return {"rope_scaling": {"type": "linear", "factor": fields[name]}}
    if not (fields.get("use_rope_scaling") or fields.get("rope_scaling")):
        return {}
    factor = fields.get("rope_scaling_factor")
    return {"rope_scaling": {"factor": float(factor) if isinstance(factor, int | float) else 8.0}}


def _refuse_unsupported(fields: Mapping[str, Any], where: object) -> None:
    problems = []
    if fields.get("num_experts") or fields.get("num_moe_experts"):
        problems.append("a mixture of experts")
    if fields.get("multi_latent_attention"):
        problems.append("multi-latent attention")
    if fields.get("position_embedding_type", "rope") != "rope":
        problems.append(f"position embedding {fields['position_embedding_type']}")
    if fields.get("normalization") == "RMSNorm" and (
        fields.get("apply_layernorm_1p") or fields.get("layernorm_zero_centered_gamma")
    ):
        problems.append("RMSNorm with zero-centered weights")
    if fields.get("softmax_type", "vanilla") != "vanilla":
        problems.append(f"softmax_type: {fields['softmax_type']}")
    window = fields.get("window_size")
    if window and not (isinstance(window, Sequence) and set(window) == {-1}):
        problems.append(f"sliding-window attention ({window})")
    problems += [f"{name}: {fields[name]}" for name in _UNSUPPORTED if fields.get(name)]
    if problems:
        raise RefusedError(
            f"{where}: not supported: {', '.join(problems)}; the converted model would compute something else"
        )
