"""Rules between Hugging Face and Megatron tensors: complete, exact inverses, correct for any rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_cpt.config import ModelConfig
from megatron_cpt.config.presets import preset
from megatron_cpt.convert.huggingface import config as hf_config
from megatron_cpt.convert.huggingface.header import TensorInfo
from megatron_cpt.convert.mapping import families, resolve
from megatron_cpt.convert.mapping.names import local_name, te_name
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.errors import RefusedError
from megatron_cpt.planning import count_parameters
from tests.helpers.hf_models import FAMILY_CONFIGS, build_hf_model, global_tensor, hf_tensors, tiny_config
from tests.helpers.odd_models import odd_configs


def meta_tensors(config):
    config = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    return hf_tensors(model)


def numbered(shapes):
    """Return tensors in which no two elements are equal, so that a misplaced element is found."""
    start, tensors = 1, []
    for shape in shapes:
        count = torch.Size(shape).numel()
        tensors.append(torch.arange(start, start + count).reshape(shape))
        start += count
    return tensors


@given(odd_configs(), st.data())
def test_rules_cover_transformers_models_and_are_exact_inverses(chosen, data):
    name, config = chosen
    family, model = hf_config.read_model(config)
    assert family.name == name
    rules = resolve.resolve(family, model)
    tensors = meta_tensors(config)
    resolve.check_hf_tensors(rules, tensors, model, "here")
    assert sorted(name for rule in rules for name in rule.hf) == sorted(tensors)
    assert count_parameters(model).total == sum(tensor.numel() for tensor in tensors.values())

    rule = data.draw(st.sampled_from(rules))
    assert expected_tensors(model)[rule.megatron] == rule.megatron_shape
    parts = numbered(rule.hf_shapes)
    whole = global_tensor(rule, *parts)
    assert tuple(whole.shape) == rule.megatron_shape
    for name, part in zip(rule.hf, parts, strict=True):
        assert torch.equal(rule.hf_rows(name, 0, part.shape[0], lambda _, rows: whole[rows]), part)
    padding = whole[model.vocab :] if rule.padded_vocab else whole[:0]
    assert not padding.any()
    assert whole.unique().numel() == sum(part.numel() for part in parts) + bool(padding.numel())

    first = data.draw(st.integers(0, rule.megatron_shape[0] - 1))
    last = data.draw(st.integers(first + 1, rule.megatron_shape[0]))
    by_name = dict(zip(rule.hf, parts, strict=True))
    assert torch.equal(rule.megatron_rows(first, last, lambda name, rows: by_name[name][rows]), whole[first:last])

    source = data.draw(st.integers(0, len(parts) - 1))
    last = data.draw(st.integers(1, parts[source].shape[0]))
    first = data.draw(st.integers(0, last - 1))
    rows = rule.hf_rows(rule.hf[source], first, last, lambda _, rows: whole[rows])
    assert torch.equal(rows, parts[source][first:last])


def rule_of(name, **shape):
    model = ModelConfig.model_validate({**preset("tiny_llama"), **shape})
    (rule,) = [rule for rule in resolve.resolve(families.FAMILIES["llama"], model) if rule.megatron == name]
    return rule


def test_qkv_is_interleaved_by_group():
    rule = rule_of("decoder.layers.1.self_attention.linear_qkv.weight", heads=4, kv_groups=2, head_dim=2, hidden=3)
    q = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])[:, None].expand(8, 3)  # 4 heads of 2 rows
    k = torch.tensor([10, 11, 12, 13])[:, None].expand(4, 3)
    v = torch.tensor([20, 21, 22, 23])[:, None].expand(4, 3)
    assert rule.hf == tuple(f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv")
    assert global_tensor(rule, q, k, v)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]


def test_the_gate_comes_first():
    rule = rule_of("decoder.layers.0.mlp.linear_fc1.weight", ffn_hidden=2, hidden=1)
    assert rule.hf == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert global_tensor(rule, torch.tensor([[1], [2]]), torch.tensor([[3], [4]])).flatten().tolist() == [1, 2, 3, 4]


def test_the_15b_has_the_count_of_its_paper_and_no_padding():
    model = ModelConfig.model_validate(preset("nemotron4_15b"))
    rules = resolve.resolve(families.FAMILIES["nemotron"], model)
    assert sum(torch.Size(rule.megatron_shape).numel() for rule in rules) == 15_628_775_424
    assert len(rules) == 2 + 32 * 8 + 2
    qkv = next(rule for rule in rules if "linear_qkv" in rule.megatron)
    assert qkv.megatron_shape == (8192, 6144)
    assert [(block.source, block.rows) for block in qkv.blocks[:4]] == [(0, 768), (1, 128), (2, 128), (0, 768)]


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_names_translate_to_transformer_engine_and_back(family):
    _, model = hf_config.read_model(tiny_config(family))
    names = [rule.megatron for rule in resolve.resolve(families.FAMILIES[family], model)]
    translated = [te_name(name) for name in names]
    assert [local_name(name) for name in translated] == names
    assert len(set(translated)) == len(names)
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in translated
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in translated
    assert not any("pre_mlp" in name or "input_layernorm" in name for name in translated)
    assert "decoder.final_layernorm.weight" in translated


# ------------------------------------------------------------------------------ a folder that does not fit


def checked(family="llama", drop=(), **changed):
    _, model = hf_config.read_model(tiny_config(family))
    tensors = hf_tensors(build_hf_model(tiny_config(family)))
    tensors = {name: tensor for name, tensor in {**tensors, **changed}.items() if name not in drop}
    resolve.check_hf_tensors(resolve.resolve(families.FAMILIES[family], model), tensors, model, "folder")


def test_every_missing_surplus_and_misshapen_tensor_is_named():
    with pytest.raises(RefusedError) as refused:
        checked(
            drop=("model.norm.weight",),
            **{
                "lm_head.weight": torch.zeros(101, 47),
                "model.layers.2.mlp.up_proj.weight": torch.zeros(1),
                "model.layers.0.input_layernorm.weight": torch.zeros(48, dtype=torch.int8),
            },
        )
    message = str(refused.value)
    assert message.startswith("folder: 4 tensors do not fit")
    assert "model.norm.weight: missing" in message
    assert "lm_head.weight: shape (101, 47), but the model's config makes it (101, 48)" in message
    assert "model.layers.2.mlp.up_proj.weight: not a tensor of this model" in message
    assert "model.layers.0.input_layernorm.weight: torch.int8" in message


def test_redundant_tensors_are_accepted():
    inv_freq = TensorInfo((8,), torch.float32, None, 0, 32)
    checked(
        "qwen2", **{"lm_head.weight": torch.zeros(101, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq}
    )
    with pytest.raises(RefusedError, match=r"lm_head.weight: shape \(3,\)"):
        checked("qwen2", **{"lm_head.weight": torch.zeros(3)})
