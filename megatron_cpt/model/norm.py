"""Norms of the local layer spec, in plain torch.

megatron-core's `WrappedTorchNorm` supports neither sequence parallelism nor zero-centered gamma (Nemotron's
LayerNorm1P), which would otherwise need Transformer Engine or Apex.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


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
