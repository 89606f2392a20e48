"""Parameters and FLOPs, compared with published numbers."""

from __future__ import annotations

import math

import pytest

from megatron_cpt.config import ModelConfig
from megatron_cpt.config.presets import preset
from megatron_cpt.planning import count_parameters, flops_per_token


def model(name: str, **changes) -> ModelConfig:
    return ModelConfig.model_validate({**preset(name), **changes})


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("nemotron4_15b", 15_628_775_424),
        ("llama3_8b", 8_030_261_248),  # what Hugging Face shows for meta-llama/Meta-Llama-3-8B
        ("smollm2_135m", 134_515_008),  # ... HuggingFaceTB/SmolLM2-135M
    ],
)
def test_totals_of_real_models(name, total):
    assert count_parameters(model(name)).total == total


def test_nemotron4_15b_by_part():
    parts = count_parameters(model("nemotron4_15b"))
    assert round(parts.layer.matmul / 1e6, 2) == 390.07
    assert round(parts.total / 1e9, 2) == 15.63
    assert round(parts.embedding / 1e9, 3) == round(parts.head / 1e9, 3) == 1.573
    assert parts.padding == 0
    assert sum(parts.to_dict().values()) == parts.total


TINY_LLAMA_LAYER = {
    "linear_qkv": (128 + 2 * 64, 128),
    "linear_proj": (128, 128),
    "linear_fc1": (2 * 344, 128),
    "linear_fc2": (128, 344),
    "input_layernorm": (128,),
    "pre_mlp_layernorm": (128,),
}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, {}),
        ({"norm": "layernorm"}, {"input_layernorm.bias": (128,), "pre_mlp_layernorm.bias": (128,)}),
        ({"qkv_bias": True}, {"linear_qkv.bias": (256,)}),
        (
            {"linear_bias": True},
            {"qkv": (256,), "proj": (128,), "fc1": (688,), "fc2": (128,)},
        ),
        ({"qk_norm": True}, {"q_layernorm": (16,), "k_layernorm": (16,)}),
        ({"head_dim": 32}, {"more qkv": (256, 128), "more proj": (128, 128)}),
    ],
)
def test_a_layer_tensor_by_tensor(changes, more):
    parts = count_parameters(model("tiny_llama", **changes))
    assert parts.layer.total == count(TINY_LLAMA_LAYER) + count(more)
    assert parts.final_norm == (256 if "norm" in changes else 128)


def test_padding_is_not_the_models():
    parts = count_parameters(model("tiny_llama"))
    assert (parts.embedding, parts.head, parts.padding) == (257 * 128, 257 * 128, 2 * 127 * 128)
    tied = count_parameters(model("tiny_llama", tied_embeddings=True))
    assert (tied.embedding, tied.head, tied.padding) == (257 * 128, 0, 127 * 128)
    assert tied.total == parts.total - parts.head


def test_flops_of_nemotron4_15b():
    flops = flops_per_token(model("nemotron4_15b"), 4096)
    assert round(flops.full / 1e9, 2) == 93.99
    assert round(flops.causal / 1e9, 2) == 89.16


def test_flops_are_six_a_weight_and_the_attention():
    shape = model("tiny_llama")
    flops = flops_per_token(shape, 64)
    weights = 4 * (count(TINY_LLAMA_LAYER) - 2 * 128) + 257 * 128
    scores_and_values = 4 * 2 * (64 * 128)  # layers x (QK^T, PV) x multiply-adds a token
    assert flops.full == 6 * (weights + scores_and_values)
    assert flops.full - flops.causal == 3 * scores_and_values
    tied = model("tiny_llama", tied_embeddings=True)
    assert flops_per_token(tied, 64) == flops  # the head works as much with shared weights
