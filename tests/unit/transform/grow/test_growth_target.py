"""MODEL.yaml: what omitted keys mean, and shapes that cannot be reached exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.config import ModelConfig
from megatron_cpt.config.presets import preset
from megatron_cpt.errors import ConfigError, UserError
from megatron_cpt.transform.grow.growth_target import read_target

LLAMA = ModelConfig.model_validate(preset("tiny_llama"))  # 4 layers, hidden 128, 8 heads of 16 in 4 groups
NEMOTRON = ModelConfig.model_validate(preset("tiny_nemotron"))


def write(folder: Path, content: Any) -> Path:
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def problems_of(folder: Path, source: ModelConfig, **fields: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_target(write(folder, fields), source)
    return caught.value.problems


def test_omitted_keys_keep_the_source(tmp_path: Path) -> None:
    target = read_target(write(tmp_path, {"hidden": 256, "heads": 16}), LLAMA)
    expected = {**LLAMA.model_dump(), "hidden": 256, "heads": 16, "kv_groups": 8}
    assert target.model_dump() == expected


def test_a_run_a_section_and_a_preset_are_accepted(tmp_path: Path) -> None:
    fields = {"preset": "tiny_llama", "hidden": 256, "heads": 16, "kv_groups": 8}
    of_section = read_target(write(tmp_path, fields), LLAMA)
    assert read_target(write(tmp_path, {"name": "a-run", "model": fields}), LLAMA) == of_section
    assert (of_section.hidden, of_section.preset) == (256, "tiny_llama")


def test_another_name_of_the_same_activation_is_accepted(tmp_path: Path) -> None:
    assert read_target(write(tmp_path, {"layers": 8, "activation": "swiglu"}), LLAMA).gated


def test_head_size_and_one_group_per_head_stay(tmp_path: Path) -> None:
    source = ModelConfig.model_validate({**LLAMA.model_dump(), "head_dim": None, "kv_groups": None})
    target = read_target(write(tmp_path, {"hidden": 256}), source)
    assert (target.head_size, target.num_kv_groups, target.heads) == (16, 8, 8)
    assert read_target(write(tmp_path, {"hidden": 256, "heads": 16}), source).num_kv_groups == 16


def test_epsilon_follows_a_width_that_is_no_multiple(tmp_path: Path) -> None:
    assert read_target(write(tmp_path, {"hidden": 160}), LLAMA).norm_eps == pytest.approx(0.8e-5)
    [problem] = problems_of(tmp_path, LLAMA, hidden=160, norm_eps=1e-5)
    assert problem == ("norm_eps: 1e-05 must be 8e-06: hidden grows from 128 to 160, which is no multiple; omit it")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 64, "heads": 8}, "hidden: 64 is smaller than the source's 128; a model can only grow"),
        ({"layers": 3}, "layers: 3 is smaller"),
        ({"layers": 8, "activation": "gelu"}, "activation: 'gelu' differs from the source's 'silu'"),
        ({"layers": 8, "gated": False}, "gated: False differs"),
        ({"layers": 8, "norm": "layernorm"}, "norm: 'layernorm' differs"),
        ({"layers": 8, "vocab": 300}, "vocab: 300 differs from the source's 257: growth keeps the tokenizer"),
        ({"layers": 8, "vocab_multiple": 64}, "vocab_multiple: 64 differs"),
        ({"layers": 8, "tied_embeddings": True}, "tied_embeddings: True differs"),
        ({"layers": 8, "rotary_percent": 0.5}, "rotary_percent: 0.5 differs"),
        ({"layers": 8, "norm_eps": 1e-6}, "norm_eps: 1e-06 must be 1e-05"),
        ({"head_dim": 32}, "head_dim: 32 differs from the source's 16: RoPE and the softmax's scale depend on it"),
        ({"heads": 16, "kv_groups": 5}, "kv_groups: 5 does not divide heads: 16"),
        ({"heads": 12, "kv_groups": 12}, "heads: 12 in 12 groups are 1 per group, but the source has 2"),
        ({"max_positions": 8192}, "nothing grows: layers, hidden, ffn_hidden, heads, kv_groups are the source's"),
        ({"layers": "eight"}, 'layers: "eight": not a whole number'),
        ({"width": 256}, "width"),
        ({"preset": "tiny_lama"}, "did you mean tiny_llama"),
    ],
)
def test_shapes_that_cannot_be_reached_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    found = problems_of(tmp_path, LLAMA, **fields)
    assert any(message in problem for problem in found), found


def test_padding_with_norms_of_heads_is_refused(tmp_path: Path) -> None:
    source = ModelConfig.model_validate({**LLAMA.model_dump(), "qk_norm": True})
    [problem] = problems_of(tmp_path, source, hidden=160)
    assert problem.startswith("hidden: 160 is no multiple of 128: the norms of the stream would need norm_eps 8e-06")
    assert read_target(write(tmp_path, {"hidden": 256}), source).hidden == 256


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    assert len(problems_of(tmp_path, NEMOTRON, hidden=64, vocab=300, activation="silu")) == 3


def test_a_missing_file_and_a_list_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        read_target(tmp_path / "none.yaml", LLAMA)
    with pytest.raises(ConfigError, match="not a section"):
        read_target(write(tmp_path, {"model": [1]}), LLAMA)
