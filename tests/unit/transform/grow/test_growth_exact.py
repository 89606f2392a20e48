"""A grown model has the logits of the small one, computed by transformers."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from megatron_cpt.transform.grow import growth_rules
from megatron_cpt.transform.grow.growth_axes import Axis
from tests.helpers.growth import difference_after_growth
from tests.helpers.hf_models import FAMILY_CONFIGS, tiny_config

LIMIT = 1e-5
BIASES = {"attention_bias": True, "mlp_bias": True}
GROWTHS: dict[str, dict[str, Any]] = {
    "width": {"width": 2},
    "depth": {"depth": 2},
    "both": {"width": 2, "depth": 2},
    "width x 3": {"width": 3, "layers": 3},
    "groups kept": {"width": 2, "kv_groups": 2},
    "more groups only": {"heads": 4, "kv_groups": 4},
    "feed-forward only": {"ffn_hidden": 144},
    "feed-forward, no multiple": {"ffn_hidden": 100},
    "heads, no multiple": {"heads": 6, "kv_groups": 3},
    "heads of old groups": {"heads": 6, "kv_groups": 2},
}
NO_MULTIPLE = {"hidden": 64, "ffn_hidden": 88, "layers": 3}


def variants() -> dict[str, dict[str, Any]]:
    """Return config.json of each family, tied and untied, with biases where the family can have them."""
    found = {}
    for family, tied in product(FAMILY_CONFIGS, (False, True)):
        found[f"{family} {'tied' if tied else 'untied'}"] = tiny_config(family, tie_word_embeddings=tied)
        if family in ("llama", "nemotron"):
            found[f"{family} {'tied' if tied else 'untied'} biases"] = tiny_config(
                family, tie_word_embeddings=tied, **BIASES
            )
    for family in ("nemotron", "mistral"):
        found[f"{family} gelu"] = tiny_config(family, hidden_act="gelu")
    found["llama one group"] = tiny_config("llama", num_key_value_heads=1)
    found["llama a group per head"] = tiny_config("llama", num_key_value_heads=4)
    return found


@pytest.mark.parametrize(
    ("name", "growth"),
    [
        ("nemotron tied biases", "both"),
        ("nemotron untied", "width x 3"),
        ("llama untied biases", "both"),
        ("qwen2 tied", "both"),
        ("qwen3 tied", "width"),
        ("smollm tied", "groups kept"),
        ("mistral untied", "heads, no multiple"),
        ("llama tied biases", "heads of old groups"),
        ("qwen2 untied", "more groups only"),
        ("qwen3 untied", "feed-forward, no multiple"),
    ],
)
def test_the_function_is_kept(name: str, growth: str) -> None:
    assert difference_after_growth(variants()[name], **GROWTHS[growth]) < LIMIT


@pytest.mark.long
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("name", variants())
def test_the_function_is_kept_in_every_family(name: str, growth: str) -> None:
    config = variants()[name]
    if config["num_key_value_heads"] != 2 and growth in ("groups kept", "more groups only", "heads of old groups"):
        pytest.skip("for two groups")
    if growth == "heads, no multiple" and config["num_key_value_heads"] != 2:
        pytest.skip("for two groups")
    for noise in (0.0, 0.316):
        assert difference_after_growth(config, noise=noise, **GROWTHS[growth]) < LIMIT


@pytest.mark.parametrize("name", ["nemotron tied biases", "llama untied"])
def test_a_width_that_is_no_multiple(name: str) -> None:
    assert difference_after_growth(variants()[name], **NO_MULTIPLE) < LIMIT


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in variants() if "qwen3" not in name])
def test_a_width_that_is_no_multiple_in_every_family(name: str) -> None:
    assert difference_after_growth(variants()[name], **NO_MULTIPLE) < LIMIT


def test_a_tied_model_needs_the_rule_of_the_final_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    original = growth_rules._norm_rules

    def without_final(old: Any, new: Any, stream: Axis) -> Any:
        return original(old.model_copy(update={"tied_embeddings": False}), new, stream)

    monkeypatch.setattr(growth_rules, "_norm_rules", without_final)
    assert difference_after_growth(variants()["qwen2 tied"], width=2) == pytest.approx(1.0, abs=1e-4)


def test_gate_and_up_must_grow_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_one_block(branch: Axis) -> Axis:
        rows = 2 * branch.num_old
        return Axis(torch.arange(2 * len(branch)) % rows, rows)

    monkeypatch.setattr(growth_rules, "gated_axis", as_one_block)
    assert difference_after_growth(variants()["llama untied"], width=2) > 0.1


def test_padding_needs_the_scaled_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama", rms_norm_eps=1e-3)
    monkeypatch.setattr("tests.helpers.growth.grown_eps", lambda model, hidden: model.norm_eps)
    monkeypatch.setattr("tests.helpers.growth.find_obstacles", lambda *_: [])
    assert difference_after_growth(config, hidden=64) > 10 * LIMIT
