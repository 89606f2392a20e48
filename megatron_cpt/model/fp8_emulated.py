"""FP8 training in numbers, on any device: linear layers whose matrix products see values that FP8 can hold.

The three operands of a linear layer (input, weight, and in the backward pass the gradient of the output) are scaled,
cast to torch's 8-bit float types with saturation, and scaled back; products and sums stay in the precision of the run.
So a recipe's effect on a loss, and what a resume does to its scaling factors, can be studied without the hardware; it
is not faster. The recipes are those of Transformer Engine: `delayed` scales by the largest magnitudes of earlier steps,
`tensorwise` by the tensor's own (current scaling).

Two differences to Transformer Engine, both so that the numbers do not depend on the parallel layout:

- delayed: a history gets one entry a step, the maximum over its micro-batches; Transformer Engine enters each of them;
- tensorwise: the maximum over a micro-batch is taken over the tensor-parallel ranks for every operand.

Formats: Micikevicius et al. 2022, arXiv 2209.05433. Scaling: NVIDIA, "Using FP8 with Transformer Engine".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

INPUT, WEIGHT, GRADIENT = range(3)
AMAX_HISTORY = "amax_history"
"""Last part of the name that a layer's history has in a checkpoint."""


@dataclass(frozen=True)
class Fp8Emulation:
    """A recipe.

    Attributes:
        recipe: `delayed` or `tensorwise`.
        format: `hybrid` (E4M3, gradients E5M2) or `e4m3`.
        history: delayed: steps whose maxima are kept.
        amax_compute: delayed: scale by the `max` of the history, or by its `most_recent` entry.
        margin: delayed: scale by 2^-margin less than would just fit.
    """

    recipe: Literal["delayed", "tensorwise"]
    format: Literal["hybrid", "e4m3"] = "hybrid"
    history: int = 1024
    amax_compute: Literal["max", "most_recent"] = "max"
    margin: int = 0

    def dtype(self, operand: int) -> torch.dtype:
        """Type of an operand's values."""
        return torch.float8_e5m2 if operand == GRADIENT and self.format == "hybrid" else torch.float8_e4m3fn


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of `x` as FP8 holds them under a scaling factor: `cast(clamp(x * scale)) / scale`, in x's own type.

    Args:
        x: any shape.
        scale: one number, fp32.
        dtype: an 8-bit float type; magnitudes beyond its largest number saturate.
    """
    limit = torch.finfo(dtype).max
    return ((x.float() * scale).clamp(-limit, limit).to(dtype).float() / scale).to(x.dtype)


def scale_for(amax: torch.Tensor, dtype: torch.dtype, margin: int = 0) -> torch.Tensor:
    """The factor that puts `amax` at the top of the format; 1 where nothing useful is known (0, not finite).

    Args:
        amax: largest magnitudes, fp32, any shape.
        dtype: an 8-bit float type.
        margin: powers of two to stay below the top.
    """
    scale = torch.finfo(dtype).max / amax.float() / 2.0**margin
    return torch.where((amax > 0) & amax.isfinite() & scale.isfinite(), scale, torch.ones_like(scale))


class EmulatedFp8(torch.nn.Module):
    """The FP8 part of a linear layer, in front of megatron-core's class.

    `amax_history` (3, history) holds the largest magnitudes of input, weight and gradient, newest first, and 0 where
    nothing is known. It is a buffer, so that checkpoints keep it. In a bf16 model it becomes bf16, which holds the
    magnitudes of bf16 tensors exactly.
    """

    fp8: Fp8Emulation
    amax_history: torch.Tensor
    step_amax: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.fp8.recipe == "delayed":
            self.register_buffer(AMAX_HISTORY, torch.zeros(3, self.fp8.history))
            self.register_buffer("step_amax", torch.zeros(3), persistent=False)

    def fp8_operand(self, x: torch.Tensor, operand: int) -> torch.Tensor:
        """Quantize one operand and note its largest magnitude."""
        amax = x.detach().abs().amax().float()
        if self.fp8.recipe == "tensorwise":
            if parallel_state.get_tensor_model_parallel_world_size() > 1:
                dist.all_reduce(amax, dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
            return quantize(x, scale_for(amax, self.fp8.dtype(operand)), self.fp8.dtype(operand))
        if self.training:
            self.step_amax[operand] = torch.maximum(self.step_amax[operand], amax)
        return quantize(x, self._delayed_scale(operand), self.fp8.dtype(operand))

    def _delayed_scale(self, operand: int) -> torch.Tensor:
        history = self.amax_history[operand].float()
        amax = history.max() if self.fp8.amax_compute == "max" else history[0]
        return scale_for(amax, self.fp8.dtype(operand), self.fp8.margin)

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        operands = (_apply(_Quantize, input, self, INPUT), _apply(_Quantize, weight, self, WEIGHT))
        output = super()._forward_impl(*operands, bias=None, **options)  # type: ignore[misc]  # of the class behind
        output = _apply(_QuantizeGradient, output, self)
        return output if bias is None else output + bias


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch has no types for it
    return result


class _Quantize(torch.autograd.Function):
    """Quantized forward, identity backward (the straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: EmulatedFp8, operand: int) -> torch.Tensor:
        return layer.fp8_operand(x, operand)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


class _QuantizeGradient(torch.autograd.Function):
    """Identity forward, quantized backward: what both products of the backward pass see."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: EmulatedFp8) -> torch.Tensor:
        ctx.layer = layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.fp8_operand(gradient, GRADIENT), None


def emulated_linears(recipe: Fp8Emulation) -> tuple[type[ColumnParallelLinear], type[RowParallelLinear]]:
    """megatron-core's two linear layers on FP8 values: classes, because layer specs are made of classes."""

    class EmulatedFp8ColumnParallelLinear(EmulatedFp8, ColumnParallelLinear):  # type: ignore[misc]  # megatron-core has no types
        fp8 = recipe

    class EmulatedFp8RowParallelLinear(EmulatedFp8, RowParallelLinear):  # type: ignore[misc]
        fp8 = recipe

    return EmulatedFp8ColumnParallelLinear, EmulatedFp8RowParallelLinear


@torch.no_grad()
def end_step(chunks: Iterable[torch.nn.Module], *, keep: bool = True) -> None:
    """Enter the step's largest magnitudes into the histories of delayed scaling; a collective call, once a step.

    Like Transformer Engine's, they are maxima over all ranks that hold a part of the same layer or a copy of it.

    Args:
        chunks: model chunks; without emulated FP8 nothing happens.
        keep: False for a step that was skipped: forget its magnitudes.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    layers = [module for module in modules if isinstance(module, EmulatedFp8) and module.fp8.recipe == "delayed"]
    if not layers:
        return
    if keep:
        amax = torch.stack([layer.step_amax.float() for layer in layers])
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
        for layer, newest in zip(layers, amax, strict=True):
            layer.amax_history.copy_(layer.amax_history.roll(1, dims=1))
            layer.amax_history[:, 0] = newest.to(layer.amax_history.dtype)
    for layer in layers:
        layer.step_amax.zero_()
