"""FP8 weights: the fp32 master weights get the drawn values, not the values that Transformer Engine rounded to FP8.

A stand-in replaces the FP8 parameter. Like `reset_parameters` of Transformer Engine (pytorch/module/base.py, 2.20) it
keeps the unrounded values on the CPU, which megatron-core's distributed optimizer reads.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_cpt.backend import cpu
from megatron_cpt.config import ModelConfig

cpu.install()

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from megatron_cpt.model.initialize import initialize_weights  # noqa: E402


def _weight() -> torch.nn.Parameter:
    """Return a parameter in uninitialized memory, as `skip_initialization` leaves it."""
    weight = torch.nn.Parameter(torch.full((16, 8), torch.nan, dtype=torch.bfloat16))
    kept = weight.detach().clone()
    weight.get_high_precision_init_val = lambda: kept
    return weight


def test_a_master_weight_is_what_was_drawn() -> None:
    weight, plain = _weight(), torch.nn.Parameter(torch.zeros(16, 8, dtype=torch.bfloat16))
    model = ModelConfig(layers=1, hidden=8, ffn_hidden=16, heads=1, vocab=16)
    for parameter in (weight, plain):
        shard = ShardedTensor.from_rank_offsets("mlp.linear_fc1.weight", parameter)
        initialize_weights([SimpleNamespace(sharded_state_dict=lambda shard=shard: {"weight": shard})], model, seed=1)
    assert torch.equal(weight.get_high_precision_init_val(), plain)
    assert plain.float().std() > 0
