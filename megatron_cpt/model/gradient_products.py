"""Weight gradients added to their fp32 buffer by the matrix product itself (`speed.fused_grad_accumulation`).

Otherwise each micro-batch writes a bf16 gradient, which another kernel adds to the buffer. Transformer Engine's layers
have this product. megatron-core's own layers, such as the output layer beside Transformer Engine's, take it from Apex.
Without Apex they get torch's product with an fp32 output, where a check shows that it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class TorchProducts:
    """Stands in for Apex's extension `fused_weight_gradient_mlp_cuda` in megatron-core."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, output_gradient: torch.Tensor, buffer: torch.Tensor) -> None:
        """Add the weight gradient of a linear layer to a buffer.

        Args:
            inputs: (n, k) inputs of the layer.
            output_gradient: (n, m), of the type of `inputs`.
            buffer: fp32 (m, k).
        """
        if inputs.dtype == torch.float32:
            buffer.addmm_(output_gradient.t(), inputs)
        else:
            torch.ops.aten.addmm.dtype_out(buffer, output_gradient.t(), inputs, torch.float32, out=buffer)


def adds_exactly(device: torch.device | int) -> bool:
    """Return whether torch adds a bf16 product to an fp32 buffer without rounding to bf16; waits for the device.

    Products of small integers are exact, and 1 + 2^-12 is an fp32 but not a bf16 number. CPUs and older releases of
    torch have no such product.
    """
    left, right = (torch.arange(64 * width, device=device).view(64, width) % 5 - 2 for width in (32, 48))
    buffer = torch.full((48, 32), 1 + 2.0**-12, device=device)
    expected = buffer + (right.t()[:, :, None] * left[None]).sum(dim=1)
    try:
        TorchProducts.wgrad_gemm_accum_fp32(left.bfloat16(), right.bfloat16(), buffer)
        return torch.equal(buffer, expected)
    except (AttributeError, RuntimeError):
        return False


def prepare_layers() -> bool:
    """Give megatron-core's own linear layers the product; call this before they are built.

    Returns:
        Whether they have it. If not, they refuse the option, and `enable_in_transformer_engine` is the way.
    """
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available and adds_exactly(torch.cuda.current_device()):
        layers.fused_weight_gradient_mlp_cuda = TorchProducts
        layers._grad_accum_fusion_available = True
    return bool(layers._grad_accum_fusion_available)


def enable_in_transformer_engine(chunks: Sequence[nn.Module]) -> None:
    """Turn the product on in Transformer Engine's layers alone."""
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
