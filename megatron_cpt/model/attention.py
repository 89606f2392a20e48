"""Core attention of the local layer spec: torch's scaled-dot-product kernels.

megatron-core's `DotProductAttention` stores the (heads x sequence x sequence) score matrix and copies keys and values
for grouped queries. torch's flash kernels, on CPUs and GPUs, do neither.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class LocalAttention(nn.Module):
    """Causal attention over the heads of one tensor-parallel rank.

    Shapes: query (s, b, heads, d), key and value (s, b, groups, d), result (s, b, heads * d). `attention_mask` is None
    (causal) or bool (b, 1, s, s), where True masks a position, as in megatron-core and unlike torch.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attention_type == "self", "the local spec has self-attention only"
        assert attn_mask_type == AttnMaskType.causal, "the local spec has causal attention only"
        self.layer_number = layer_number
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: Any,
    ) -> torch.Tensor:
        """Compute attention; the query heads of a group share its keys and values."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # (b, heads, s, d)
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        batch, heads, length, size = out.shape
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * size)
