"""Logits of converted models equal the logits of transformers, for every family and for odd sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.helpers.hf_models import FAMILY_CONFIGS, build_hf_model, global_tensor, hf_tensors, tiny_config
from tests.helpers.odd_models import odd_configs
from tests.helpers.ranks import run_ranks


def megatron_model(fields: dict[str, Any]) -> Any:
    """Return a GPTModel of the local spec with random weights; call inside `process_groups`."""
    from megatron_cpt.checkpoint.state.state_dicts import unwrap
    from megatron_cpt.config import draft_config
    from megatron_cpt.model.build_model import build_model

    data = {
        "name": "logits",
        "output": "never-written",
        "model": fields,
        "seq_length": 48,
        "batch": {"global": 1, "micro": 1},
        "tokens": 48,
        "schedule": {"shape": "constant", "max_lr": 1.0e-3, "min_lr": 1.0e-3},
        "sources": {"web": {"path": "web", "tokens": 48}},
        "phases": [{"name": "all", "blend": {"web": 1.0}}],
        "precision": {"compute": "fp32"},
    }
    return unwrap(build_model(draft_config(data).finish("test")).chunks[0])


def largest_difference(config: dict[str, Any]) -> float:
    """Return the largest difference of the logits of transformers and Megatron, over 2 x 48 tokens."""
    from megatron_cpt.backend.distributed import process_groups
    from megatron_cpt.config import ParallelConfig
    from megatron_cpt.convert.huggingface import config as hf_config
    from megatron_cpt.convert.mapping import resolve

    reference = build_hf_model(config)
    tensors = hf_tensors(reference)
    family, model = hf_config.read_model(config)
    tokens = torch.randint(0, config["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(1))
    with process_groups(ParallelConfig()):
        ours = megatron_model(model.model_dump(mode="json", exclude={"preset"})).eval()
        state = {
            rule.megatron: global_tensor(rule, *(tensors[name] for name in rule.hf))
            for rule in resolve.resolve(family, model)
        }
        result = ours.load_state_dict(state, strict=False)
        assert not result.unexpected_keys
        assert not [name for name in result.missing_keys if not name.endswith("_extra_state")]
        with torch.no_grad():
            logits = ours(tokens, torch.arange(48).expand(2, 48), None)[..., : model.vocab]
            return (logits - reference(tokens).logits).abs().max().item()


def differences(families: list[str]) -> dict[str, float]:
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    found = {family: largest_difference(tiny_config(family)) for family in families}
    found["linear RoPE scaling"] = largest_difference(tiny_config("llama", rope_parameters=linear))
    return found


def differences_of_odd_models(families: list[str], examples: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {family: [] for family in families}
    for family in families:

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(odd_configs(family))
        def collect(chosen):
            family, config = chosen
            found[family].append(largest_difference(config))
            assert found[family][-1] < 1e-4, chosen

        collect()
    return found


def differences_of_both_kinds(families: list[str]) -> tuple[dict[str, float], dict[str, list[float]]]:
    return differences(families), differences_of_odd_models(families, 1)


def test_logits_of_every_family_and_of_odd_models_equal_transformers():
    ((found, odd),) = run_ranks(1, differences_of_both_kinds, sorted(FAMILY_CONFIGS))
    assert sorted(odd) == sorted(FAMILY_CONFIGS)
    assert found.keys() == {*FAMILY_CONFIGS, "linear RoPE scaling"}
    assert max(found.values()) < 1e-4, found
    assert all(len(odd[family]) >= 1 for family in FAMILY_CONFIGS)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_logits_of_many_odd_models_equal_transformers(family):
    (found,) = run_ranks(1, differences_of_odd_models, [family], 60)
    assert len(found[family]) >= 60


def test_a_logit_that_is_nan_is_a_difference() -> None:
    from megatron_cpt.convert.logits import _compare

    logits = [torch.zeros(3, 5), torch.zeros(2, 5)]
    prompts = [torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long)]
    assert _compare(logits, logits, prompts, "TP 1 x PP 1", "random ids").max_difference == 0.0
    logits_with_nan = [logits[0], logits[1].index_fill(1, torch.tensor([4]), float("nan"))]
    report = _compare(logits_with_nan, logits, prompts, "TP 1 x PP 1", "random ids")
    assert not report.max_difference <= 1e-4
    assert math.isnan(report.mean_kl)


def test_padding_that_takes_part_in_the_softmax_is_a_difference_of_losses() -> None:
    from megatron_cpt.convert.logits import _compare

    logits, prompts = [torch.full((4, 5), -6.6)], [torch.arange(4)]
    padded = [torch.nn.functional.pad(logits[0], (0, 3))]
    report = _compare(padded, logits, prompts, "TP 1 x PP 1", "random ids")
    assert report.max_difference == 0.0
    # log(5 exp(-6.6) + 3) + 6.6 - log(5)
    assert report.max_loss_difference == pytest.approx(6.0914, abs=1e-4)
    excluded = [torch.nn.functional.pad(logits[0], (0, 3), value=-math.inf)]
    assert _compare(excluded, logits, prompts, "TP 1 x PP 1", "random ids").max_loss_difference == 0.0
