"""FP8 linear layers over `torch._scaled_mm`, for machines without Transformer Engine.

All three products of a linear layer multiply 8-bit operands: Y = X W', dX = dY W and dW = dY' X. Inputs and weights are
E4M3. Gradients are E5M2 with format `hybrid`. Scales follow `fp8_emulated.py`, which is the reference; recipe
`rowwise` has one scale per row of the first operand and per column of the second one.

cuBLAS multiplies a row-major matrix by a column-major one, with sizes in multiples of 16. So the backward pass needs
transposed copies, which cost one byte per element. As in Transformer Engine, only the forward product accumulates in
the reduced precision of the tensor cores (`use_fast_accum`): `_2X_ACC_FPROP = False`, `_2X_ACC_DGRAD = True` and
`_2X_ACC_WGRAD = True` in its pytorch/module/base.py. Per-row scales follow torchao's float8 `ROWWISE` recipe.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.jit import jit_fuser

from megatron_cpt.model.fp8_emulated import GRADIENT, INPUT, WEIGHT, Fp8Layer, scale_for

SIZE_MULTIPLE = 16


class Quantized(NamedTuple):
    """FP8 values and the fp32 factors by which they are multiplied: a scalar, or (rows, 1), or (1, columns)."""

    values: torch.Tensor
    inverse_scale: torch.Tensor


def scaled_product(
    left: Quantized, right: Quantized, *, dtype: torch.dtype, fast_accumulation: bool = False
) -> torch.Tensor:
    """Return the product of two quantized matrices, accumulated in fp32.

    Args:
        left: (m, k), row-major.
        right: (k, n), column-major, with at most one operand in E5M2.
        dtype: of the result; with factors per row cuBLAS returns bf16 only.
        fast_accumulation: use the reduced precision of the tensor cores' accumulators.

    Raises:
        ValueError: k or n is not a multiple of 16.
    """
    (_, inner), (_, columns) = left.values.shape, right.values.shape
    if inner % SIZE_MULTIPLE or columns % SIZE_MULTIPLE:
        raise ValueError(
            f"precision.fp8.backend: torch: a product of {tuple(left.values.shape)} and {tuple(right.values.shape)} "
            f"has a size that is not a multiple of {SIZE_MULTIPLE}; change the width of the model or the micro-batch"
        )
    if left.values.device.type == "cpu":
        # torch has this operator for CPUs, and a test compares both, but it takes seconds for a layer of a small model.
        product = left.values.float() @ right.values.float()
        return (product * left.inverse_scale * right.inverse_scale).to(dtype)
    return torch._scaled_mm(
        left.values,
        right.values,
        scale_a=left.inverse_scale,
        scale_b=right.inverse_scale,
        out_dtype=dtype,
        use_fast_accum=fast_accumulation,
    )


def _cast(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `x * scale` in FP8; larger magnitudes than the format's saturate."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


_fused_cast = jit_fuser(_cast)  # one kernel instead of four, compiled at its first use


def cast(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """Quantize a matrix with a given scale, which broadcasts to its shape."""
    return Quantized((_fused_cast if x.is_cuda else _cast)(x, scale, dtype), scale.reciprocal())


def cast_along(x: torch.Tensor, dim: int, dtype: torch.dtype) -> Quantized:
    """Quantize a matrix with one scale per row (`dim=1`) or per column (`dim=0`), from the largest magnitude in it."""
    return cast(x, scale_for(x.abs().amax(dim=dim, keepdim=True), dtype), dtype)


def row_major(x: Quantized) -> Quantized:
    """Return a first operand of `scaled_product`."""
    return Quantized(x.values.contiguous(), x.inverse_scale)


def column_major(x: Quantized) -> Quantized:
    """Return a second operand of `scaled_product`."""
    return Quantized(x.values.t().contiguous().t(), x.inverse_scale)


class TorchFp8(Fp8Layer):
    """Mixin that multiplies in FP8 in one of megatron-core's linear layers."""

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None = None,
        **_: Any,
    ) -> torch.Tensor:
        output: torch.Tensor = _Fp8Linear.apply(  # type: ignore[no-untyped-call]  # torch has no types for apply
            input,
            weight,
            self,
            tp_group if sequence_parallel else None,
            tp_group if allreduce_dgrad else None,
            gradient_accumulation_fusion,
        )
        return output if bias is None else output + bias


class _Fp8Linear(torch.autograd.Function):
    """Linear layer without bias on one rank, with the communication of tensor parallelism around it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        layer: TorchFp8,
        gather_group: dist.ProcessGroup | None,
        reduce_group: dist.ProcessGroup | None,
        accumulates: bool,
    ) -> torch.Tensor:
        """Multiply; `x` (s, b, k) is this rank's part of the sequence if there is a `gather_group`."""
        rows, dtype = x.reshape(-1, x.shape[-1]), layer.fp8.dtype(INPUT)
        if layer.fp8.recipe == "rowwise":
            saved, input_scale, weight_scale = rows, None, None
            left = cast_along(_gathered(rows, gather_group), 1, dtype)
            right = cast_along(weight.t(), 0, layer.fp8.dtype(WEIGHT))
        else:
            input_scale, weight_scale = layer.scale_of(rows, INPUT), layer.scale_of(weight, WEIGHT)
            own = cast(rows, input_scale, dtype)
            saved = own.values
            left = Quantized(_gathered(own.values, gather_group), own.inverse_scale)
            right = cast(weight.t(), weight_scale, layer.fp8.dtype(WEIGHT))
        # `weight.t()` is column-major already, and a cast keeps the order.
        output = scaled_product(
            row_major(left), column_major(right), dtype=_result_dtype(layer, x), fast_accumulation=True
        )
        ctx.save_for_backward(saved, weight, input_scale, weight_scale)
        ctx.layer, ctx.gather_group, ctx.reduce_group = layer, gather_group, reduce_group
        ctx.main_grad = weight.main_grad if accumulates and hasattr(weight, "main_grad") else None
        return output.to(x.dtype).view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of input and weight; communication overlaps with the product of the weight."""
        saved, weight, input_scale, weight_scale = ctx.saved_tensors
        layer, is_rowwise = ctx.layer, ctx.layer.fp8.recipe == "rowwise"
        # In this order, because CUDA_DEVICE_MAX_CONNECTIONS=1 starts communication before the product that hides it.
        whole, gathering = _start_gather(saved, ctx.gather_group)
        rows = gradient.reshape(-1, gradient.shape[-1])
        e4m3, e5m2 = layer.fp8.dtype(INPUT), layer.fp8.dtype(GRADIENT)  # with format e4m3 both are E4M3
        if is_rowwise:
            by_row, by_column = cast_along(rows, 1, e5m2), cast_along(rows, 0, e5m2)
            right = cast_along(weight, 0, e4m3)
        else:
            by_row = by_column = cast(rows, layer.scale_of(rows, GRADIENT), e5m2)
            right = cast(weight, weight_scale, e4m3)
        dtype = _result_dtype(layer, gradient)
        of_rows = scaled_product(row_major(by_row), column_major(right), dtype=dtype).to(gradient.dtype)
        _wait(gathering)
        of_rows, reduction = _start_reduction(of_rows, ctx.gather_group, ctx.reduce_group)
        whole_input = cast_along(whole, 0, e4m3) if is_rowwise else Quantized(whole, input_scale.reciprocal())
        left = Quantized(by_column.values.t(), by_column.inverse_scale.t())
        dtype = _result_dtype(layer, weight if ctx.main_grad is None else ctx.main_grad)
        product = scaled_product(row_major(left), column_major(whole_input), dtype=dtype)
        of_weight = product.to(weight.dtype) if ctx.main_grad is None else _accumulate(weight, ctx.main_grad, product)
        _wait(reduction)
        shape = (-1, *gradient.shape[1:-1], weight.shape[1])
        return of_rows.view(shape), of_weight, None, None, None, None


def _result_dtype(layer: TorchFp8, like: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if layer.fp8.recipe == "rowwise" else like.dtype


def _gathered(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    whole, work = _start_gather(rows, group)
    _wait(work)
    return whole


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()


def _start_gather(rows: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, Any]:
    """Start to gather the rows of all ranks; FP8 travels as bytes.

    Returns:
        The rows, to be used after `_wait` of the second value.
    """
    if group is None:
        return rows, None
    own, whole = rows.contiguous(), rows.new_empty((rows.shape[0] * group.size(), rows.shape[1]))
    wire = torch.uint8 if rows.element_size() == 1 else rows.dtype
    return whole, dist.all_gather_into_tensor(whole.view(wire), own.view(wire), group=group, async_op=True)


def _start_reduction(
    rows: torch.Tensor, gather_group: dist.ProcessGroup | None, reduce_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, Any]:
    """Start to sum the gradient of the input over the ranks that share it.

    Returns:
        The sum, to be used after `_wait` of the second value.
    """
    if gather_group is not None:
        own = rows.new_empty((rows.shape[0] // gather_group.size(), rows.shape[1]))
        return own, dist.reduce_scatter_tensor(own, rows, group=gather_group, async_op=True)
    if reduce_group is not None:
        return rows, dist.all_reduce(rows, group=reduce_group, async_op=True)
    return rows, None


def _accumulate(weight: torch.Tensor, main_grad: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """Add to the fp32 gradient buffer, and return what autograd gets: megatron-core's hook ignores the values."""
    main_grad.add_(gradient)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
