"""config.json: published files are read, unsupported models are refused, transformers reads what is written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from transformers import AutoConfig

from megatron_cpt.config import ModelConfig
from megatron_cpt.config.presets import preset
from megatron_cpt.convert.huggingface import config as hf_config
from megatron_cpt.convert.huggingface.config import matching, to_hf_config
from megatron_cpt.convert.mapping import families
from megatron_cpt.errors import RefusedError, UserError
from tests.helpers.hf_models import FAMILY_CONFIGS, tiny_config
from tests.helpers.odd_models import odd_configs

# Keys of published config.json files, as transformers 4 wrote them.
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
LLAMA_3_8B = {
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
MINITRON_4B = {
    "head_dim": 128,
    "hidden_act": "relu2",
    "hidden_size": 3072,
    "initializer_range": 0.0134,
    "intermediate_size": 9216,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "nemotron",
    "norm_eps": 1e-05,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "vocab_size": 256000,
}


@pytest.mark.parametrize(
    ("config", "family", "name"),
    [
        (SMOLLM2_135M, "smollm", "smollm2_135m"),
        (LLAMA_3_8B, "llama", "llama3_8b"),
        (MINITRON_4B, "nemotron", "nemotron_mini_4b"),
    ],
)
def test_published_configs_are_the_presets(config, family, name):
    found, model = hf_config.read_model(config)
    assert found.name == family
    assert model == ModelConfig.model_validate(preset(name))
    written = to_hf_config(found, model)
    assert {key: written[key] for key in config if key != "architectures"} == {
        key: value for key, value in config.items() if key != "architectures"
    } | ({"rope_theta": float(config["rope_theta"])})


@given(odd_configs())
def test_what_is_written_is_what_was_read(chosen):
    _, config = chosen
    family, model = hf_config.read_model(config)
    written = json.loads(json.dumps(to_hf_config(family, model, "float16")))
    assert hf_config.read_model(written) == (family, model)
    assert family in matching(model)

    parsed = dict(written)
    theirs = AutoConfig.for_model(parsed.pop("model_type"), **parsed)
    assert str(theirs.dtype) == "torch.float16"
    again = theirs.to_dict()
    assert hf_config.read_model(again) == (family, model), "after transformers has read and written it"
    assert {key: again[key] for key in config} == config | (
        {"rope_parameters": again["rope_parameters"]} if "rope_parameters" in config else {}
    )


def test_rope_in_the_old_and_the_new_form():
    old = {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    config = {**tiny_config("smollm"), **old}
    _, model = hf_config.read_model(config)
    assert model.rotary_base == 500000.0
    assert model.rope_scaling is not None
    assert (model.rope_scaling.factor, model.rope_scaling.original_max_positions) == (32.0, 8192)
    linear = {**tiny_config("llama"), "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}
    family, interpolated = hf_config.read_model(linear)
    assert interpolated.rope_scaling is not None
    assert (interpolated.rope_scaling.type, interpolated.rope_scaling.factor) == ("linear", 4.0)
    assert hf_config.to_hf_config(family, interpolated)["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": 10000.0,
    }
    new = {**tiny_config("smollm"), "rope_parameters": {"rope_theta": 500000.0, **old["rope_scaling"]}}
    assert hf_config.read_model(new)[1] == model
    _, half = hf_config.read_model({**tiny_config("nemotron"), "rope_parameters": None, "partial_rotary_factor": 0.25})
    assert (half.rotary_percent, half.rotary_base) == (0.25, 10000.0)
    del (config := tiny_config("nemotron"))["rope_parameters"]
    assert hf_config.read_model(config)[1].rotary_percent == 0.5  # transformers' own default


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type: 'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "4"}}, "factor: '4'; it must be a number"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one flat object"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": "8"}}, "factor: '8'; it must be a number"),
        (
            "llama",
            {"partial_rotary_factor": 0.5, "rope_parameters": None},
            "partial_rotary_factor: 0.5; in this family",
        ),
        ("llama", {"attention_bias": True}, "attention_bias: True with mlp_bias: False"),
        ("qwen3", {"attention_bias": True}, "attention_bias: true; Megatron"),
        ("mistral", {"sliding_window": 32}, "sliding_window: 32; attention here sees all earlier tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window: 32"),
        ("mistral", {"sliding_window": 64, "layer_types": 5}, "layer_types: only models whose layers"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: quantized weights"),
        ("smollm", {"rope_interleaved": True}, "rope_interleaved: true"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu'; known are"),
        ("llama", {"hidden_size": "48"}, "hidden_size: '48'; it must be a positive whole number"),
        ("llama", {"hidden_size": True}, "hidden_size: True"),
        ("llama", {"vocab_size": 0}, "vocab_size: 0"),
        ("llama", {"num_hidden_layers": 1 << 40}, "num_hidden_layers: 1099511627776"),
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers: None"),
        ("llama", {"num_key_value_heads": 3}, "4 is not a multiple of 3 key/value heads"),
        ("llama", {"head_dim": 15}, "rotate 15 of 15 elements per head, not a positive even number"),
        ("nemotron", {"head_dim": 2}, "rotate 1 of 2 elements per head, not a positive even number"),
        ("llama", {"rms_norm_eps": -1.0}, "norm_eps: -1.0: "),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps: nan; it must be a number"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes'; it must be true or false"),
        (
            "llama",
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not known, so its weights cannot be converted; known are llama, mistral, nemotron",
        ),
        ("llama", {"model_type": None}, "model_type None is not known"),
    ],
)
def test_what_cannot_be_computed_is_refused(family, changes, message):
    with pytest.raises(RefusedError) as refused:
        hf_config.read_model(tiny_config(family, **changes), "/models/x/config.json")
    assert message in str(refused.value)
    assert str(refused.value).startswith("/models/x/config.json")


def test_all_problems_are_reported_together():
    with pytest.raises(RefusedError) as refused:
        hf_config.read_model(tiny_config("qwen3", hidden_size=0, vocab_size=None, attention_bias=True))
    assert str(refused.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 64}),  # as long as the longest sequence: no effect
        ("qwen2", {"use_sliding_window": False, "sliding_window": 32}),
    ],
)
def test_windows_without_effect_are_read(family, changes):
    assert hf_config.read_model(tiny_config(family, **changes))[0].name == family


def test_missing_keys_take_the_defaults_of_transformers():
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name, family in families.FAMILIES.items():
        config = {key: tiny_config(name)[key] for key in sizes} | {"num_attention_heads": 32, "hidden_size": 128}
        theirs = AutoConfig.for_model(family.model_type, **config).to_dict()
        if name == "mistral":  # its default is a window
            config["sliding_window"] = theirs["sliding_window"] = None
        mark = {family.mark: True} if family.mark else {}
        config |= {"model_type": family.model_type, **mark}
        assert hf_config.read_model(config) == hf_config.read_model({**theirs, **mark}), name


# -------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("preset_name", "changes", "names"),
    [
        ("tiny_nemotron", {}, ["nemotron"]),
        ("tiny_llama", {}, ["llama", "smollm", "mistral"]),
        ("tiny_llama", {"qkv_bias": True}, ["qwen2"]),
        ("tiny_llama", {"qk_norm": True}, ["qwen3"]),
        ("tiny_llama", {"linear_bias": True}, ["llama", "smollm"]),
        ("tiny_llama", {"qkv_bias": True, "qk_norm": True}, []),
        ("tiny_llama", {"rotary_percent": 0.5}, []),
        ("tiny_nemotron", {"norm": "layernorm"}, []),
    ],
)
def test_families_of_a_model(preset_name, changes, names):
    model = ModelConfig.model_validate({**preset(preset_name), **changes})
    assert [family.name for family in matching(model)] == names


def test_a_model_that_a_family_cannot_express():
    model = ModelConfig.model_validate({**preset("tiny_nemotron"), "rope_scaling": {"factor": 4}})
    with pytest.raises(RefusedError) as refused:
        to_hf_config(families.by_name("llama"), model)
    message = str(refused.value)
    for part in ("not a llama model", "gated: False", "norm: 'layernorm1p'", "rotary_percent: 0.5", "squared_relu"):
        assert part in message
    with pytest.raises(UserError, match="'lama' is not known; known are nemotron, llama"):
        families.by_name("lama")


def test_every_family_has_a_helper_model():
    assert sorted(families.FAMILIES) == sorted(FAMILY_CONFIGS)
