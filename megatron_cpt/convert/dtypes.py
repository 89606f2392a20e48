"""Dtypes of weights, and casts that refuse to make a weight infinite."""

from __future__ import annotations

import torch

from megatron_cpt.errors import RefusedError, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_dtype(name: str | None) -> torch.dtype | None:
    """Return a dtype by its name in `DTYPES`, or None for None.

    Raises:
        UserError: no dtype has this name.
    """
    if name is not None and name not in DTYPES:
        raise UserError(f"dtype {name!r} is not known; choose {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in another dtype.

    Raises:
        RefusedError: a weight is too large for the dtype, so it would become infinite.
    """
    result = tensor.to(dtype)
    if dtype is not tensor.dtype and not is_finite(result) and is_finite(tensor):
        largest = tensor.abs().max().item()
        raise RefusedError(f"{name}: holds weights up to {largest:.4g}, too large for {dtype}; choose bf16 or fp32")
    return result


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise if a weight is NaN or infinite.

    Raises:
        RefusedError: a weight is not finite.
    """
    if not is_finite(tensor):
        raise RefusedError(
            f"{name}: holds weights that are not finite, so the model's loss would be NaN; copy the file again "
            "(or import it unchanged: `convert import --allow-nan`)"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # one pass without temporary tensors; a NaN makes both results NaN
    return bool(torch.isfinite(low) and torch.isfinite(high))
