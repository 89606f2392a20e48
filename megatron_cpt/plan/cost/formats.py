"""What Transformer Engine holds of a tensor in FP8 or FP4, in bytes an element with its scales.

Read in Transformer Engine 2.20, `get_scale_shape` in pytorch/tensor/float8_blockwise_tensor.py, mxfp8_tensor.py and
nvfp4_tensor.py; what is gathered, in megatron-core 0.16.1 and 0.19.2, distributed/param_and_grad_buffer.py. What scales
are padded with is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.plan.hardware import Gpu


@dataclass(frozen=True)
class Format:
    """Bytes an element.

    Attributes:
        weight: of a weight in one direction, the rows' or the columns'.
        kept: of the input of a matrix product, which is kept in one direction for the backward pass.
        gathered: of an updated weight as it travels, where `precision.fp8.params` keeps weights in this format.
        has_two_directions: whether blocks make two tensors of every weight, whatever the GPU can multiply.
    """

    weight: float
    kept: float
    gathered: float
    has_two_directions: bool


_ONE_SCALE = Format(weight=1.0, kept=1.0, gathered=1.0, has_two_directions=False)
FORMATS = {
    "delayed": _ONE_SCALE,
    "tensorwise": _ONE_SCALE,
    # An fp32 scale for 128 x 128 values of a weight, and for 128 values of an input.
    "blockwise": Format(weight=1 + 4 / 128**2, kept=1 + 4 / 128, gathered=1.0, has_two_directions=True),
    # A byte for 32 values. The two directions round differently, so the weights travel in bf16, for which
    # megatron-core takes the buffer of the gradients.
    "mxfp8": Format(weight=1 + 1 / 32, kept=1 + 1 / 32, gathered=2.0, has_two_directions=True),
    # Half a byte, and a byte for 16 values.
    "nvfp4": Format(weight=1 / 2 + 1 / 16, kept=1 / 2 + 1 / 16, gathered=2.0, has_two_directions=True),
}


def format_of(config: RunConfig) -> Format | None:
    """The format of a layer's matrix products; None: bf16 or fp32, as with the emulated backend."""
    if config.precision.fp4 is not None:
        return FORMATS[config.precision.fp4.recipe]
    fp8 = config.precision.fp8
    return FORMATS[fp8.recipe] if fp8 is not None and fp8.backend == "transformer_engine" else None


def weight_bytes(kind: Format, gpu: Gpu | None) -> float:
    """Bytes of a weight that forward and backward products read.

    Before Blackwell, FP8 products take operands in one order only, so Transformer Engine keeps the transposed weight as
    well (`is_non_tn_fp8_gemm_supported`); a GPU that is not named is one of those.
    """
    has_two = kind.has_two_directions or gpu is None or gpu.needs_fp8_transposes
    return (2 if has_two else 1) * kind.weight


def quantized_layers(config: RunConfig, stage: int) -> int:
    """Layers of a pipeline stage that compute in FP8 or FP4: without the `first_last_bf16` of both ends."""
    precision, parallel, layers = config.precision, config.parallel, config.model.layers
    section = precision.fp4 or precision.fp8
    if section is None or format_of(config) is None:
        return 0
    a_chunk = max(1, layers // (parallel.pipeline * parallel.virtual_pipeline))
    firsts = [(chunk * parallel.pipeline + stage) * a_chunk for chunk in range(parallel.virtual_pipeline)]
    numbers = [number for first in firsts for number in range(first, first + a_chunk)]
    ends = section.first_last_bf16
    return sum(ends <= number < layers - ends for number in numbers)
