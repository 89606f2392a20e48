"""Tensors of a whole model and their shapes, from its config alone.

Tensors are global (before tensor parallelism cuts them) and named as in the local layer spec. Example: hidden 128,
8 heads of size 16 in 4 key/value groups. `linear_qkv` has a row per output: 8 x 16 for the queries, 4 x 16 for the keys
and 4 x 16 for the values, which makes its weight (256, 128).
"""

from __future__ import annotations

from megatron_cpt.config import ModelConfig, Norm
from megatron_cpt.convert.mapping.names import EMBEDDING, OUTPUT_LAYER


def shape_table(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a model has, with `*` for the number of the layer."""
    hidden, head_size, ffn_hidden = model.hidden, model.head_size, model.ffn_hidden
    qkv_rows = (model.heads + 2 * model.num_kv_groups) * head_size
    fc1_rows = ffn_hidden * (2 if model.gated else 1)
    has_norm_bias = model.norm is not Norm.RMSNORM
    has_qkv_bias = model.qkv_bias or model.linear_bias
    layer = "decoder.layers.*"
    table: dict[str, tuple[tuple[int, ...], bool]] = {
        EMBEDDING: ((model.padded_vocab, hidden), True),
        f"{layer}.input_layernorm.weight": ((hidden,), True),
        f"{layer}.input_layernorm.bias": ((hidden,), has_norm_bias),
        f"{layer}.self_attention.linear_qkv.weight": ((qkv_rows, hidden), True),
        f"{layer}.self_attention.linear_qkv.bias": ((qkv_rows,), has_qkv_bias),
        f"{layer}.self_attention.q_layernorm.weight": ((head_size,), model.qk_norm),
        f"{layer}.self_attention.q_layernorm.bias": ((head_size,), model.qk_norm and has_norm_bias),
        f"{layer}.self_attention.k_layernorm.weight": ((head_size,), model.qk_norm),
        f"{layer}.self_attention.k_layernorm.bias": ((head_size,), model.qk_norm and has_norm_bias),
        f"{layer}.self_attention.linear_proj.weight": ((hidden, model.heads * head_size), True),
        f"{layer}.self_attention.linear_proj.bias": ((hidden,), model.linear_bias),
        f"{layer}.pre_mlp_layernorm.weight": ((hidden,), True),
        f"{layer}.pre_mlp_layernorm.bias": ((hidden,), has_norm_bias),
        f"{layer}.mlp.linear_fc1.weight": ((fc1_rows, hidden), True),
        f"{layer}.mlp.linear_fc1.bias": ((fc1_rows,), model.linear_bias),
        f"{layer}.mlp.linear_fc2.weight": ((hidden, ffn_hidden), True),
        f"{layer}.mlp.linear_fc2.bias": ((hidden,), model.linear_bias),
        "decoder.final_layernorm.weight": ((hidden,), True),
        "decoder.final_layernorm.bias": ((hidden,), has_norm_bias),
        OUTPUT_LAYER: ((model.padded_vocab, hidden), not model.tied_embeddings),
    }
    return {name: shape for name, (shape, is_present) in table.items() if is_present}


def expected_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, with one name per layer."""
    table = shape_table(model)
    expected = {name: shape for name, shape in table.items() if "*" not in name}
    for layer in range(model.layers):
        expected |= {name.replace("*", str(layer)): shape for name, shape in table.items() if "*" in name}
    return expected
