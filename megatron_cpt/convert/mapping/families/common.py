"""Lines that the tables of several families share. Lines whose tensor a model lacks (see `shapes`) are skipped."""

from __future__ import annotations

from megatron_cpt.convert.mapping.patterns import Copy, Gated, Pattern, Qkv

_ATTENTION, _HF_ATTENTION = "decoder.layers.*.self_attention", "model.layers.*.self_attn"
_MLP, _HF_MLP = "decoder.layers.*.mlp", "model.layers.*.mlp"


def qkv(kind: str) -> Qkv:
    """Return the line for the `weight` or `bias` of the fused projection of queries, keys and values."""
    q, k, v = (f"{_HF_ATTENTION}.{letter}_proj.{kind}" for letter in "qkv")
    return Qkv(f"{_ATTENTION}.linear_qkv.{kind}", q=q, k=k, v=v)


EMBEDDINGS: tuple[Pattern, ...] = (
    Copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", padded_vocab=True),
    Copy("output_layer.weight", "lm_head.weight", padded_vocab=True),
)

NORMS: tuple[Pattern, ...] = (
    Copy("decoder.layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.weight"),
    Copy("decoder.layers.*.input_layernorm.bias", "model.layers.*.input_layernorm.bias"),
    Copy("decoder.layers.*.pre_mlp_layernorm.weight", "model.layers.*.post_attention_layernorm.weight"),
    Copy("decoder.layers.*.pre_mlp_layernorm.bias", "model.layers.*.post_attention_layernorm.bias"),
    Copy("decoder.final_layernorm.weight", "model.norm.weight"),
    Copy("decoder.final_layernorm.bias", "model.norm.bias"),
)

ATTENTION: tuple[Pattern, ...] = (
    qkv("weight"),
    Copy(f"{_ATTENTION}.linear_proj.weight", f"{_HF_ATTENTION}.o_proj.weight"),
)

QK_NORMS: tuple[Pattern, ...] = (
    Copy(f"{_ATTENTION}.q_layernorm.weight", f"{_HF_ATTENTION}.q_norm.weight"),
    Copy(f"{_ATTENTION}.k_layernorm.weight", f"{_HF_ATTENTION}.k_norm.weight"),
)

PLAIN_MLP: tuple[Pattern, ...] = (
    Copy(f"{_MLP}.linear_fc1.weight", f"{_HF_MLP}.up_proj.weight"),
    Copy(f"{_MLP}.linear_fc1.bias", f"{_HF_MLP}.up_proj.bias"),
    Copy(f"{_MLP}.linear_fc2.weight", f"{_HF_MLP}.down_proj.weight"),
    Copy(f"{_MLP}.linear_fc2.bias", f"{_HF_MLP}.down_proj.bias"),
)

GATED_MLP: tuple[Pattern, ...] = (
    Gated(f"{_MLP}.linear_fc1.weight", gate=f"{_HF_MLP}.gate_proj.weight", up=f"{_HF_MLP}.up_proj.weight"),
    Gated(f"{_MLP}.linear_fc1.bias", gate=f"{_HF_MLP}.gate_proj.bias", up=f"{_HF_MLP}.up_proj.bias"),
    Copy(f"{_MLP}.linear_fc2.weight", f"{_HF_MLP}.down_proj.weight"),
    Copy(f"{_MLP}.linear_fc2.bias", f"{_HF_MLP}.down_proj.bias"),
)

ATTENTION_BIASES: tuple[Pattern, ...] = (
    qkv("bias"),
    Copy(f"{_ATTENTION}.linear_proj.bias", f"{_HF_ATTENTION}.o_proj.bias"),
)
