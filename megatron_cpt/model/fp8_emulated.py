"""Emulated FP8 training on any device: linear layers whose matrix products use values rounded to FP8.

The three operands of a linear layer (input, weight, and in the backward pass the gradient of the output) are scaled,
cast to torch's 8-bit float types with saturation, and scaled back. Products and sums keep the precision of the run.
This shows the effect of a recipe on the loss, and of a resume on its scaling factors, without the hardware. It is not
faster.

The recipes are Transformer Engine's: `delayed` scales by the largest magnitude of earlier steps, `tensorwise` by the
largest magnitude of the tensor (current scaling). For example, if the largest magnitude is 7, E4M3, whose largest
number is 448, gets the scale 448 / 7 = 64.

There are two differences from Transformer Engine, which make the numbers independent of the parallel layout:

- delayed: a history gets one entry per step, the maximum over the micro-batches, instead of one per micro-batch;
- tensorwise: the maximum is taken over the tensor-parallel ranks for every operand.

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
"""Last part of the name of a layer's history in a checkpoint."""


@dataclass(frozen=True)
class LocalFp8:
    """FP8 recipe of the local layers, emulated or real.

    Attributes:
        recipe: `rowwise` is real only, see `fp8_torch.py`.
        format: `hybrid` (E4M3, gradients E5M2) or `e4m3`.
        history: steps whose maxima are kept (delayed).
        amax_compute: scale by the `max` of the history or by its `most_recent` entry (delayed).
        margin: divide the scale by 2^margin (delayed).
    """

    recipe: Literal["delayed", "tensorwise", "rowwise"]
    format: Literal["hybrid", "e4m3"] = "hybrid"
    history: int = 1024
    amax_compute: Literal["max", "most_recent"] = "max"
    margin: int = 0

    def dtype(self, operand: int) -> torch.dtype:
        """Return the FP8 type of an operand."""
        return torch.float8_e5m2 if operand == GRADIENT and self.format == "hybrid" else torch.float8_e4m3fn


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round `x` to FP8 and back: `cast(clamp(x * scale)) / scale`, in the type of `x`.

    The scale is an fp32 scalar. Magnitudes above the largest number of the 8-bit `dtype` saturate at it.
    """
    limit = torch.finfo(dtype).max
    return ((x.float() * scale).clamp(-limit, limit).to(dtype).float() / scale).to(x.dtype)


def scale_for(amax: torch.Tensor, dtype: torch.dtype, margin: int = 0) -> torch.Tensor:
    """Return the scale that maps `amax` to the largest number of the format; 1 if `amax` is 0 or not finite.

    The largest magnitudes `amax` may have any shape. `margin` counts powers of two below the largest number.
    """
    scale = torch.finfo(dtype).max / amax.float() / 2.0**margin
    return torch.where((amax > 0) & amax.isfinite() & scale.isfinite(), scale, torch.ones_like(scale))


class Fp8Layer(torch.nn.Module):
    """Mixin that adds FP8 scales to one of megatron-core's linear layers.

    `amax_history` (3, history) holds the largest magnitudes of input, weight and gradient, newest first; unused entries
    are 0. It is a buffer, so checkpoints contain it. In a bf16 model it becomes bf16, which holds the magnitudes of
    bf16 tensors exactly.
    """

    fp8: LocalFp8
    amax_history: torch.Tensor
    step_amax: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.fp8.recipe == "delayed":
            self.register_buffer(AMAX_HISTORY, torch.zeros(3, self.fp8.history))
            self.register_buffer("step_amax", torch.zeros(3), persistent=False)

    @classmethod
    def linears(cls, recipe: LocalFp8) -> tuple[type, type]:
        """Return the column- and row-parallel layers of this kind for a recipe; a layer spec consists of classes."""
        column, row = (
            type(f"{cls.__name__}{base.__name__}", (cls, base), {"fp8": recipe})
            for base in (ColumnParallelLinear, RowParallelLinear)
        )
        return column, row

    def scale_of(self, x: torch.Tensor, operand: int) -> torch.Tensor:
        """Return the scale of one operand, and record its largest magnitude."""
        amax = x.detach().abs().amax().float()
        if self.fp8.recipe == "tensorwise":
            if parallel_state.get_tensor_model_parallel_world_size() > 1:
                dist.all_reduce(amax, dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
            return scale_for(amax, self.fp8.dtype(operand))
        if self.training:
            self.step_amax[operand] = torch.maximum(self.step_amax[operand], amax)
        return self._delayed_scale(operand)

    def _delayed_scale(self, operand: int) -> torch.Tensor:
        history = self.amax_history[operand].float()
        amax = history.max() if self.fp8.amax_compute == "max" else history[0]
        return scale_for(amax, self.fp8.dtype(operand), self.fp8.margin)


class EmulatedFp8(Fp8Layer):
    """Mixin that multiplies values rounded to FP8 in one of megatron-core's linear layers."""

    def fp8_operand(self, x: torch.Tensor, operand: int) -> torch.Tensor:
        """Quantize one operand and record its largest magnitude."""
        return quantize(x, self.scale_of(x, operand), self.fp8.dtype(operand))

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        operands = (_apply(_Quantize, input, self, INPUT), _apply(_Quantize, weight, self, WEIGHT))
        output = super()._forward_impl(*operands, bias=None, **options)  # type: ignore[misc]  # defined by the linear layer
        output = _apply(_QuantizeGradient, output, self)
        return output if bias is None else output + bias


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]  # torch has no types for apply
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
    """Identity forward, quantized backward: both products of the backward pass use the quantized gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: EmulatedFp8) -> torch.Tensor:
        ctx.layer = layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.fp8_operand(gradient, GRADIENT), None


@torch.no_grad()
def end_step(chunks: Iterable[torch.nn.Module], *, keep: bool = True) -> None:
    """Add the largest magnitudes of a step to the histories of delayed scaling; a collective call, once per step.

    As in Transformer Engine, a magnitude is the maximum over all ranks with a shard or a copy of the layer.

    Args:
        chunks: model chunks; layers of other kinds are ignored.
        keep: False discards the magnitudes, for a step whose update was skipped.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    layers = [module for module in modules if isinstance(module, Fp8Layer) and module.fp8.recipe == "delayed"]
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
