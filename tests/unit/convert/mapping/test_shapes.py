"""The table of tensors is the model that is built, in names, shapes and number of parameters."""

from __future__ import annotations

import pytest
import torch

from megatron_cpt.backend import cpu, process_groups
from megatron_cpt.config import draft_config
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.planning.cost.parameters import count_parameters
from tests.unit.model.test_capabilities import RUN

cpu.install()

from megatron_cpt.checkpoint.state.state_dicts import unwrap  # noqa: E402
from megatron_cpt.model.build_model import build_model  # noqa: E402

MODELS = {
    "nemotron": {"preset": "tiny_nemotron"},
    "llama": {"preset": "tiny_llama", "tied_embeddings": True},
    "layer norm of queries and keys": {"preset": "tiny_nemotron", "qk_norm": True, "head_dim": 24},
    "RMS norm of queries and keys": {"preset": "tiny_llama", "qk_norm": True, "head_dim": 24},
    "biases": {"preset": "tiny_llama", "qkv_bias": True, "linear_bias": True, "norm": "layernorm"},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_the_model(name: str) -> None:
    run = draft_config({**RUN, "model": {**MODELS[name], "layers": 2}}).finish("run.yaml")
    with process_groups(run.parallel):
        (chunk,) = build_model(run, draw_weights=False).chunks
    weights = {key: tuple(parameter.shape) for key, parameter in unwrap(chunk).named_parameters()}
    assert weights == expected_tensors(run.model)
    counted = count_parameters(run.model)
    assert sum(torch.Size(shape).numel() for shape in weights.values()) == counted.total + counted.padding
