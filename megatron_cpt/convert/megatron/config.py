"""What model a checkpoint of Megatron is: from its own record, or from what the user says.

Our checkpoints say it in run.yaml. Megatron-LM keeps its arguments (`args` in common.pt or in model_optim_rng.pt),
Megatron-Bridge a run_config.yaml (with its model builders: a `transformer` section in it), NeMo 2 a context/model.yaml,
all with the fields of megatron-core's TransformerConfig. Fields are read as plain values, nothing is built from them;
sizes are held against the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_cpt.checkpoint.layout import RUN_FILE, STATE_FILE
from megatron_cpt.config import ModelConfig, preset_names, read_mapping
from megatron_cpt.config.presets import preset
from megatron_cpt.convert.mapping.tensors import EMBEDDING, OUTPUT_LAYER, Weights
from megatron_cpt.convert.megatron.torch_dist_reader import newest_iteration
from megatron_cpt.errors import RefusedError, UserError

_PLACES = ("run_config.yaml", "../run_config.yaml", "context/model.yaml", "../context/model.yaml")
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
# Arguments that change what the model computes and leave no trace in its tensors.
_OTHER_FUNCTIONS = (
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "seq_len_interpolation_factor",
    "apply_residual_connection_post_layernorm",
    "no_rope_freq",
    "softmax_scale",
    "qk_l2_norm",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "use_mup",
)
# By the names of functions in megatron-core, torch, NeMo 2, and the short ones that Megatron-Bridge writes.
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
    path: Path, weights: Weights, common: Mapping[str, Any], named_model: str | None
) -> ModelConfig:
    """The model of a checkpoint.

    Args:
        path: its folder, as the user named it.
        weights: its tensors.
        common: what it has beside them.
        named_model: a preset or a YAML file with the model section; it wins.

    Raises:
        UserError: nothing says what it is, or `named_model` is not known.
        RefusedError: the record is one of a model that this software cannot train.
    """
    if named_model is not None:
        return _named(named_model)
    if (path / STATE_FILE).is_file() and (path / RUN_FILE).is_file():
        return _build(read_mapping(path / RUN_FILE).get("model"), path / RUN_FILE)
    arguments = common.get("args")
    fields = arguments if isinstance(arguments, Mapping) else getattr(arguments, "state", None)
    where: object = f"{path}: args"
    if not isinstance(fields, Mapping):
        where, fields = _find_config(path)
    return _build(model_fields(fields, weights, where), where)


def _named(name: str) -> ModelConfig:
    if name in preset_names():
        return ModelConfig.model_validate({"preset": name, **preset(name)})
    path = Path(name)
    if not path.is_file():
        raise UserError(f"--model {name}: neither a file nor a preset; presets are {', '.join(preset_names())}")
    fields = read_mapping(path)
    return _build(fields.get("model", fields), path)


def _build(fields: Any, where: object) -> ModelConfig:
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RefusedError(f"{where}: no model that can be converted: {problems}") from error


def _find_config(path: Path) -> tuple[Path, Mapping[str, Any]]:
    folders = [folder for folder in (newest_iteration(path), path) if folder is not None]
    for file in (folder / name for folder in folders for name in _PLACES):
        if file.is_file():
            try:
                data = yaml.load(file.read_text(encoding="utf-8"), Loader=_PlainLoader)
            except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
                raise RefusedError(f"{file}: not YAML that can be read: {error}") from error
            for key in ("model", "config", "transformer"):
                if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
                    data = {**data, **data[key]}
            if isinstance(data, Mapping):
                return file, data
    raise UserError(f"{path}: does not say what model it is; name it: --model PRESET or --model FILE.yaml")


class _PlainLoader(yaml.SafeLoader):
    """Reads tags of Python objects as the plain value below them."""


def _plain(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if ":python/name:" in tag:
        return tag.rpartition(":")[2]  # a function, by its name
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value


_PlainLoader.add_multi_constructor("", _plain)


def model_fields(fields: Mapping[str, Any], weights: Weights, where: object) -> dict[str, Any]:
    """Megatron's fields (arguments of Megatron-LM or of TransformerConfig) -> the model section of run.yaml.

    Raises:
        RefusedError: a size is missing, or the model has parts that this software does not know.
    """
    if EMBEDDING not in weights.tensors:
        raise RefusedError(f"{where}: the checkpoint has no {EMBEDDING}")
    _refuse_unknown(fields, where)
    missing = [name for name in _SIZES if name != "kv_channels" and not isinstance(fields.get(name), int)]
    if missing:
        raise RefusedError(f"{where}: does not say {', '.join(missing)}; name the model: --model FILE.yaml")
    found = {ours: fields[theirs] for theirs, ours in _SIZES.items() if fields.get(theirs) is not None}
    found |= {ours: fields[theirs] for theirs, ours in _OPTIONAL.items() if fields.get(theirs) is not None}
    if "max_positions" not in found and fields.get("seq_length") is not None:
        found["max_positions"] = fields["seq_length"]
    rows = weights.tensors[EMBEDDING].shape[0]
    vocab = fields.get("vocab_size")
    is_grouped = fields.get("group_query_attention", True)  # Megatron-LM's num_query_groups counts only with this flag
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
        return "gelu"  # Megatron-LM without a flag
    if name not in _ACTIVATIONS:
        raise RefusedError(f"{where}: activation_func {function!r} is not known; name the model: --model FILE.yaml")
    return _ACTIVATIONS[name]


def _norm(fields: Mapping[str, Any]) -> str:
    if fields.get("normalization") == "RMSNorm":
        return "rmsnorm"
    zero_centered = fields.get("apply_layernorm_1p") or fields.get("layernorm_zero_centered_gamma")
    return "layernorm1p" if zero_centered else "layernorm"


def _rope_scaling(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("old_context_len"):  # NeMo 2 scales the frequencies of Llama 3.1 itself
        factors = {"factor": "scale_factor", "original_max_positions": "old_context_len"}
        factors |= {name: name for name in ("low_freq_factor", "high_freq_factor")}
        return {"rope_scaling": {ours: fields[theirs] for ours, theirs in factors.items() if theirs in fields}}
    if not (fields.get("use_rope_scaling") or fields.get("rope_scaling")):
        return {}
    factor = fields.get("rope_scaling_factor")
    return {"rope_scaling": {"factor": float(factor) if isinstance(factor, int | float) else 8.0}}


def _refuse_unknown(fields: Mapping[str, Any], where: object) -> None:
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
        problems.append(f"attention over a window ({window})")
    problems += [f"{name}: {fields[name]}" for name in _OTHER_FUNCTIONS if fields.get(name)]
    if problems:
        raise RefusedError(f"{where}: {', '.join(problems)}: not a model that this software trains")
