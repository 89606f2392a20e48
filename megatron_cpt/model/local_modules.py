"""Modules of the local layer spec, in plain torch.

Attention: megatron-core's `DotProductAttention` stores the (heads x sequence x sequence) score matrix and copies keys
and values for grouped queries. torch's flash kernels, on CPUs and GPUs, do neither.

Norms: megatron-core's `WrappedTorchNorm` supports neither sequence parallelism nor zero-centered gamma (Nemotron's
LayerNorm1P), which would otherwise need Transformer Engine or Apex.
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


class LocalNorm(nn.Module):
    """LayerNorm, LayerNorm1P or RMSNorm over the last dimension.

    With `layernorm_zero_centered_gamma` the stored weight is w - 1: it starts at zero, and weight decay would pull w to
    1. The mark `sequence_parallel` on a parameter makes megatron-core sum its gradients over the tensor-parallel ranks,
    which hold different parts of a sequence.

    Shapes: input and output (..., hidden_size); weight and bias (hidden_size,).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.is_zero_centered = bool(config.layernorm_zero_centered_gamma)
        dtype = config.params_dtype
        initial = torch.zeros if self.is_zero_centered else torch.ones
        self.weight = nn.Parameter(initial(hidden_size, dtype=dtype, device=torch.cuda.current_device()))
        self.bias: nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=torch.cuda.current_device()))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalize; torch's kernels compute the statistics of bf16 inputs in fp32."""
        weight = self.weight + 1 if self.is_zero_centered else self.weight
        if self.bias is None:
            return nn.functional.rms_norm(hidden, weight.shape, weight, self.eps)
        return nn.functional.layer_norm(hidden, weight.shape, weight, self.bias, self.eps)
