"""Rules of growth on small tensors, with exact numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_cpt.config import ModelConfig
from megatron_cpt.transform.grow.growth_axes import FRESH, axis, head_origins, layer_origins, width_axis
from megatron_cpt.transform.grow.growth_rules import GrowthRule, Noise, OldTensor, grow_rows, grow_tensor, growth_rules

EMBEDDING = "embedding.word_embeddings.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.0.self_attention.linear_proj.weight"
FC1, FC2 = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight"
FINAL = "decoder.final_layernorm"


def model(**fields: Any) -> ModelConfig:
    plain = {"layers": 1, "hidden": 2, "ffn_hidden": 3, "heads": 2, "kv_groups": 1, "head_dim": 1, "vocab": 2}
    return ModelConfig.model_validate({**plain, "vocab_multiple": 1, "norm": "rmsnorm", **fields})


OLD = model()
WIDE = model(hidden=4, ffn_hidden=6, heads=4, kv_groups=2)


def test_embedding_columns_are_tiled_and_not_divided() -> None:
    grown = grow_tensor(EMBEDDING, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), OLD, WIDE)
    assert grown.tolist() == [[1, 2, 1, 2], [3, 4, 3, 4]]


def test_an_output_layer_is_divided_unless_it_is_tied() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert grow_tensor("output_layer.weight", weight, OLD, WIDE)[0].tolist() == [0.5, 1, 0.5, 1]
    assert "output_layer.weight" not in growth_rules(model(tied_embeddings=True), model(hidden=4, tied_embeddings=True))


@pytest.mark.parametrize(
    ("norm", "tied", "weight", "bias"),
    [
        ("rmsnorm", False, [4.0, 4.0], None),
        ("rmsnorm", True, [2.0, 2.0], None),
        ("layernorm", True, [2.0, 2.0], [3.0, 3.0]),
        ("layernorm1p", False, [4.0, 4.0], [6.0, 6.0]),
        ("layernorm1p", True, [1.5, 1.5], [3.0, 3.0]),  # (1 + 4) / 2 - 1
    ],
)
def test_the_final_norm_is_divided_if_the_output_is_tied(
    norm: str, tied: bool, weight: list[float], bias: list[float] | None
) -> None:
    old, new = (model(norm=norm, tied_embeddings=tied, hidden=hidden) for hidden in (1, 2))
    assert grow_tensor(f"{FINAL}.weight", torch.tensor([4.0]), old, new).tolist() == weight
    if bias is not None:
        assert grow_tensor(f"{FINAL}.bias", torch.tensor([6.0]), old, new).tolist() == bias
    layer = grow_tensor("decoder.layers.0.pre_mlp_layernorm.weight", torch.tensor([4.0]), old, new)
    assert layer.tolist() == [4, 4]


def test_whole_groups_of_queries_keys_and_values_repeat() -> None:
    rows = torch.tensor([[1.0, 10], [2, 20], [3, 30], [4, 40]])  # q0 q1 k v
    grown = grow_tensor(QKV, rows, OLD, WIDE)
    assert grown[:, 0].tolist() == [0.5, 1, 1.5, 2, 0.5, 1, 1.5, 2]
    assert torch.equal(grown[:, 2:], grown[:, :2])


def test_queries_repeat_inside_groups_that_are_kept() -> None:
    rows = torch.tensor([[1.0, 10], [2, 20], [3, 30], [4, 40]])
    kept = model(hidden=4, ffn_hidden=6, heads=4, kv_groups=1)
    assert grow_tensor(QKV, rows, OLD, kept)[:, 0].tolist() == [0.5, 1, 0.5, 1, 1.5, 2]
    grown = grow_tensor(PROJ, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), OLD, kept)
    assert grown.tolist() == 2 * [[0.5, 1, 0.5, 1], [1.5, 2, 1.5, 2]]


def test_heads_meet_copies_of_their_own_keys() -> None:
    old = model(heads=4, kv_groups=2)
    more_groups = head_origins(old, model(heads=4, kv_groups=4))
    assert more_groups.heads == [0, 2, 1, 3]  # one head per group; groups 0 and 2 have the keys of the old group 0
    assert more_groups.groups == [0, 1, 0, 1]
    fresh = head_origins(old, model(heads=9, kv_groups=3))
    assert fresh.heads == [0, 1, FRESH, 2, 3, FRESH, FRESH, FRESH, FRESH]
    assert fresh.groups == [0, 1, FRESH]


def test_gate_and_up_grow_apart() -> None:
    old, new = (model(gated=True, hidden=1, ffn_hidden=width) for width in (2, 4))
    grown = grow_tensor(FC1, torch.tensor([[1.0], [2], [3], [4]]), old, new)
    assert grown.flatten().tolist() == [1, 2, 1, 2, 3, 4, 3, 4]


def test_more_neurons_that_are_no_multiple_add_nothing() -> None:
    new = model(ffn_hidden=5)
    fc2 = torch.arange(6.0).reshape(2, 3)
    assert grow_tensor(FC2, fc2, OLD, new).tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]]
    fc1 = grow_tensor(FC1, torch.ones(3, 2), OLD, new)
    assert torch.equal(fc1[:3], torch.ones(3, 2))
    assert fc1[3:].abs().min() > 0


def test_a_stream_that_is_no_multiple_is_padded() -> None:
    rms = model(hidden=3)
    assert grow_tensor(PROJ, torch.eye(2), OLD, rms).tolist() == [[1, 0], [0, 1], [0, 0]]
    norm = grow_tensor(f"{FINAL}.weight", torch.tensor([3.0, 6.0]), OLD, rms)
    assert norm.tolist() == pytest.approx([3 * (2 / 3) ** 0.5, 6 * (2 / 3) ** 0.5, 1])
    old, new = (model(norm="layernorm", hidden=hidden) for hidden in (2, 3))
    embedding = grow_tensor(EMBEDDING, torch.tensor([[1.0, 3.0], [5.0, 5.0]]), old, new)
    assert embedding.tolist() == [[1, 3, 2], [5, 5, 5]]  # fresh elements are the mean, which LayerNorm subtracts
    assert grow_tensor(PROJ, torch.tensor([[1.0, 2], [3, 4]]), old, new).tolist() == [[1, 2], [3, 4], [2, 3]]


def test_noise_cancels_over_the_copies_of_a_column() -> None:
    weight = torch.arange(1.0, 7.0).reshape(2, 3)
    old, new = model(), model(ffn_hidden=9)
    plain, noisy = (grow_tensor(FC2, weight, old, new, noise=noise, seed=3) for noise in (0.0, 0.5))
    noise = noisy - plain
    assert torch.allclose(noise[:, :3], -noise[:, 3:6])
    assert not noise[:, 6:].any()  # the odd copy
    assert noise[:, :6].abs().min() > 0
    large = grow_tensor(FC2, torch.ones(2, 3000), model(ffn_hidden=3000), model(ffn_hidden=6000), noise=0.5)
    assert (large - 0.5).std() == pytest.approx(0.25, rel=0.05)  # half of the RMS of the grown row


def test_rows_do_not_depend_on_how_they_are_read() -> None:
    old, new = model(ffn_hidden=150, hidden=5), model(ffn_hidden=400, hidden=10)
    weight = torch.randn(150, 5, generator=torch.Generator().manual_seed(0))
    rule: GrowthRule = growth_rules(old, new)["decoder.layers.*.mlp.linear_fc1.weight"]
    tensor = OldTensor(lambda first, last: weight[first:last], 150)
    noise = Noise(0.3, 7, FC1)
    whole = grow_rows(rule, 0, 400, tensor, noise)
    parts = [grow_rows(rule, first, min(400, first + 37), tensor, noise) for first in range(0, 400, 37)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(grow_rows(rule, 0, 400, tensor, Noise(0.3, 8, FC1)), whole)
    assert not torch.equal(grow_rows(rule, 0, 400, tensor, Noise(0.3, 7, FC2)), whole)


def test_axes() -> None:
    assert width_axis(2, 5).origins.tolist() == [0, 1, FRESH, FRESH, FRESH]
    mixed = axis([0, 1, 0, FRESH, 0], 2)
    assert mixed.copies.tolist() == [3, 1, 3, 1, 3]
    assert mixed.ordinals.tolist() == [0, 0, 1, 0, 2]


@pytest.mark.parametrize(
    ("old", "new", "copied"),
    [(4, 4, []), (4, 6, [1, 3]), (4, 8, [0, 1, 2, 3]), (32, 40, [3, 7, 11, 15, 19, 23, 27, 31]), (2, 5, [0, 1, 1])],
)
def test_identity_layers_are_spread_evenly(old: int, new: int, copied: list[int]) -> None:
    origins = layer_origins(old, new)
    assert len(origins) == new
    assert [origin.layer for origin in origins if not origin.is_identity] == list(range(old))
    assert [origin.layer for origin in origins if origin.is_identity] == copied
    assert [origin.layer for origin in origins] == sorted(origin.layer for origin in origins)
