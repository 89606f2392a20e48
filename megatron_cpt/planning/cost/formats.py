"""Bytes per element, with scales, of tensors that Transformer Engine or torch store in FP8 or FP4.

Sources: Transformer Engine 2.20, `get_scale_shape` in pytorch/tensor/float8_blockwise_tensor.py, mxfp8_tensor.py and
nvfp4_tensor.py; for gathered weights megatron-core 0.16.1 and 0.19.2, distributed/param_and_grad_buffer.py. Padding of
scales is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.planning.cost.rank_layout import stage_chunks
from megatron_cpt.planning.hardware import Gpu


@dataclass(frozen=True)
class Format:
    """Bytes per element of tensors in one format.

    Attributes:
        weight: of a weight in one direction (scales along rows or columns).
        saved: of the input of a matrix product, saved in one direction for the backward pass.
        gathered: of a gathered weight, if `precision.fp8.params` stores weights in this format.
        has_two_directions: weights are always stored twice, with scales along rows and along columns.
    """

    weight: float
    saved: float
    gathered: float
    has_two_directions: bool


_ONE_SCALE = Format(weight=1.0, saved=1.0, gathered=1.0, has_two_directions=False)
FORMATS = {
    "delayed": _ONE_SCALE,
    "tensorwise": _ONE_SCALE,
    # One fp32 scale per 128 x 128 values of a weight, and per 128 values of an input.
    "blockwise": Format(weight=1 + 4 / 128**2, saved=1 + 4 / 128, gathered=1.0, has_two_directions=True),
    # One byte per 32 values. The two directions round differently, so weights are gathered in bf16; megatron-core uses
    # the gradient buffer for them.
    "mxfp8": Format(weight=1 + 1 / 32, saved=1 + 1 / 32, gathered=2.0, has_two_directions=True),
    # Half a byte per value, and one byte per 16 values: 0.5625.
    "nvfp4": Format(weight=1 / 2 + 1 / 16, saved=1 / 2 + 1 / 16, gathered=2.0, has_two_directions=True),
}
# `fp8_torch.py` casts a weight for each product. It saves inputs in FP8, or in bf16 with one factor per row, because
# the backward pass needs factors along the other dimension.
TORCH_FORMATS = {
    "delayed": Format(weight=0.0, saved=1.0, gathered=2.0, has_two_directions=False),
    "tensorwise": Format(weight=0.0, saved=1.0, gathered=2.0, has_two_directions=False),
    "rowwise": Format(weight=0.0, saved=2.0, gathered=2.0, has_two_directions=False),
}


def format_of(config: RunConfig) -> Format | None:
    """Return the format of matrix products in layers; None for bf16 or fp32, also with the emulated backend."""
    if config.precision.fp4 is not None:
        return FORMATS[config.precision.fp4.recipe]
    fp8 = config.precision.fp8
    if fp8 is None or fp8.backend == "emulated":
        return None
    return (TORCH_FORMATS if fp8.backend == "torch" or fp8.recipe == "rowwise" else FORMATS)[fp8.recipe]


def weight_bytes(kind: Format, gpu: Gpu | None) -> float:
    """Return the bytes per weight that forward and backward products read.

    Before Blackwell, FP8 products take operands in one order only, so Transformer Engine also stores the transposed
    weight (`is_non_tn_fp8_gemm_supported`). `gpu=None` assumes such a GPU.
    """
    has_two = kind.has_two_directions or gpu is None or gpu.needs_fp8_transposes
    return (2 if has_two else 1) * kind.weight


def quantized_layers(config: RunConfig, stage: int) -> int:
    """Return the number of layers of a stage that compute in FP8 or FP4, without `first_last_bf16` at both ends.

    With 8 layers, 2 stages of 2 chunks each and `first_last_bf16: 1`, stage 0 has layers 0, 1, 4, 5, of which 3 count.
    """
    section = config.precision.fp4 or config.precision.fp8
    if section is None or format_of(config) is None:
        return 0
    ends = section.first_last_bf16
    in_format = range(ends, config.model.layers - ends)
    return sum(number in in_format for chunk in stage_chunks(config, stage) for number in chunk)
