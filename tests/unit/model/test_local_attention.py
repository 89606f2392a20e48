"""Grouped queries with a mask: copies of keys and values per query head give the attention of groups."""

from __future__ import annotations

import torch

from megatron_cpt.backend import cpu

cpu.install()

from megatron_cpt.model.local_modules import repeat_groups  # noqa: E402  # after the CPU backend


def test_repeated_groups_give_the_attention_of_grouped_queries():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 12, 16) for heads in (6, 2, 2))
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    attention = torch.nn.functional.scaled_dot_product_attention
    grouped = attention(query, key, value, attn_mask=mask, enable_gqa=True)
    repeated = attention(query, repeat_groups(key, 6), repeat_groups(value, 6), attn_mask=mask)
    torch.testing.assert_close(repeated, grouped)
    assert repeat_groups(query, 6) is query
