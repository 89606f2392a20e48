"""Shape to grow to: MODEL.yaml, and the reasons why a shape cannot be reached without changing the function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.config import ModelConfig, read_mapping
from megatron_cpt.config.presets import preset
from megatron_cpt.config.validate import validate_file
from megatron_cpt.errors import ConfigError

SIZES = ("layers", "hidden", "ffn_hidden", "heads", "kv_groups")
"""Fields that may grow."""
_REASONS = {
    "vocab": "growth keeps the tokenizer; `convert import --add-tokens` adds tokens",
    "vocab_multiple": "growth keeps the rows of the embedding",
    "padding_in_softmax": "the loss would change",
    "activation": "the MLP would compute another function",
    "gated": "the MLP would compute another function",
    "norm": "the norms would compute another function",
    "rotary_percent": "the attention would compute another function",
    "rotary_base": "the attention would compute another function",
    "rope_scaling": "the attention would compute another function",
    "tied_embeddings": "growth keeps the tie between embedding and output layer, or its absence",
    "linear_bias": "growth keeps the biases",
    "qkv_bias": "growth keeps the biases",
    "qk_norm": "the attention would compute another function",
}
_ADVICE = "omit it to keep the source's value"


def read_target(path: Path, source: ModelConfig) -> ModelConfig:
    """Return the shape that a file asks for; keys that it omits keep the source's values.

    Omitted `kv_groups` keep the number of heads per group. An omitted `norm_eps` follows the width where it has to.

    Args:
        path: MODEL.yaml with the keys of run.yaml's `model` section, or a run.yaml.
        source: the small model.

    Raises:
        UserError: the file cannot be read.
        ConfigError: with every value that is invalid or cannot be reached exactly.
    """
    data = read_mapping(path)
    given = data.get("model", data)
    if isinstance(given, str):  # the short form of {preset: NAME}
        given = {"preset": given}
    if not isinstance(given, dict):
        raise ConfigError(str(path), ["model: not a section; write key: value below it"])
    fields = {**_preset_fields(given, path), **given}
    kept = source.model_dump(mode="json", exclude={"preset"})
    target = validate_file(ModelConfig, {**kept, **_following_fields(fields, source), **fields}, str(path))
    if problems := list(find_obstacles(source, target)):
        raise ConfigError(str(path), problems)
    return target


def _preset_fields(given: dict[str, Any], path: Path) -> dict[str, Any]:
    if given.get("preset") is None:
        return {}
    try:
        return preset(str(given["preset"]))
    except ValueError as error:
        raise ConfigError(str(path), [f"preset: {given['preset']!r}: {error}"]) from error


def _following_fields(fields: dict[str, Any], source: ModelConfig) -> dict[str, Any]:
    """Return the fields that follow from other ones if the file omits them."""
    found: dict[str, Any] = {}
    hidden, heads = fields.get("hidden", source.hidden), fields.get("heads", source.heads)
    if not isinstance(hidden, int) or not isinstance(heads, int) or hidden < 1 or heads < 1:
        return found  # reported by the validation
    if "head_dim" not in fields and hidden // heads != source.head_size:
        found["head_dim"] = source.head_size
    if "kv_groups" not in fields and source.kv_groups is not None:
        found["kv_groups"] = max(1, heads * source.kv_groups // source.heads)
    if "norm_eps" not in fields:
        found["norm_eps"] = grown_eps(source, hidden)
    return found


def grown_eps(source: ModelConfig, hidden: int) -> float:
    """Return the epsilon of the norms at another width.

    If the width is no multiple, fresh elements of the stream that are zero reduce its mean square by d/d'.
    """
    return source.norm_eps if hidden % source.hidden == 0 else source.norm_eps * source.hidden / hidden


def size_of(model: ModelConfig, field: str) -> int:
    """Return the value of a field of `SIZES`, with its default filled in."""
    return model.num_kv_groups if field == "kv_groups" else int(getattr(model, field))


def find_obstacles(source: ModelConfig, target: ModelConfig) -> Iterator[str]:
    """Yield why the source cannot become the target with an unchanged function, one line per field."""
    before, after = source.model_dump(mode="json"), target.model_dump(mode="json")
    sizes = {key: (size_of(source, key), size_of(target, key)) for key in SIZES}
    for key, (old, new) in sizes.items():
        if new < old:
            yield f"{key}: {new} is smaller than the source's {old}; a model can only grow"
    for key, reason in _REASONS.items():
        if before[key] != after[key]:
            yield f"{key}: {after[key]!r} differs from the source's {before[key]!r}: {reason}; {_ADVICE}"
    if target.head_size != source.head_size:
        yield (
            f"head_dim: {target.head_size} differs from the source's {source.head_size}: RoPE and the softmax's scale "
            f"depend on it; set head_dim: {source.head_size}, or more heads"
        )
    yield from _find_head_obstacles(source, target)
    yield from _find_norm_obstacles(source, target)
    if all(old == new for old, new in sizes.values()):
        yield f"nothing grows: {', '.join(sizes)} are the source's; give at least one larger value"


def _find_head_obstacles(source: ModelConfig, target: ModelConfig) -> Iterator[str]:
    if target.heads % target.num_kv_groups:
        yield (
            f"kv_groups: {target.num_kv_groups} does not divide heads: {target.heads}; choose a divisor, or omit it to "
            "keep the number of heads per group"
        )
        return
    per_group, old_per_group = target.heads // target.num_kv_groups, source.heads // source.num_kv_groups
    is_whole = target.heads % source.heads == 0 and target.num_kv_groups % source.num_kv_groups == 0
    if not is_whole and per_group < old_per_group:
        yield (
            f"heads: {target.heads} in {target.num_kv_groups} groups are {per_group} per group, but the source has "
            f"{old_per_group}, which would lose their keys and values; choose multiples of {source.heads} heads and "
            f"{source.num_kv_groups} groups, or at least {old_per_group} heads per group"
        )


def _find_norm_obstacles(source: ModelConfig, target: ModelConfig) -> Iterator[str]:
    needed = grown_eps(source, target.hidden)
    is_padded = target.hidden > source.hidden and target.hidden % source.hidden != 0
    if is_padded and source.qk_norm:
        yield (
            f"hidden: {target.hidden} is no multiple of {source.hidden}: the norms of the stream would need "
            f"norm_eps {needed:.6g} and the norms of queries and keys {source.norm_eps:g}, but megatron-core has one "
            f"for all; choose a multiple of {source.hidden}"
        )
    elif not math.isclose(target.norm_eps, needed, rel_tol=1e-6):
        reason = (
            f"hidden grows from {source.hidden} to {target.hidden}, which is no multiple"
            if is_padded
            else "the norms would compute another function"
        )
        yield f"norm_eps: {target.norm_eps:g} must be {needed:.9g}: {reason}; omit it"
