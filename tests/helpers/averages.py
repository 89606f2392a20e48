"""Comparison of an average of checkpoints with numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.helpers.checkpoints import read_tensors


def bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the bits of fp32 or bf16 numbers."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).numpy()


def as_fp32(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return fp32 or bf16 numbers as numpy's fp32: bf16 is its upper half."""
    if tensor.dtype == torch.float32:
        return tensor.numpy()
    return (bits(tensor).astype(np.int32) << 16).view(np.float32)


def rounded_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Return the bits of fp32 numbers rounded to bf16, ties to even."""
    whole = values.view(np.uint32).astype(np.uint64)
    return ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


def assert_is_average(output: Path, paths: Sequence[Path], weights: Sequence[float], dtype: torch.dtype) -> None:
    """Compare every weight, bit for bit, with numpy's sum of the tensors that torch's reader gathers."""
    result, gathered = read_tensors(output), [read_tensors(path) for path in paths]
    names = [name for name in gathered[0] if not name.startswith(("optimizer.", "rng"))]
    assert sorted(result) == sorted(names)
    for name in names:
        total = np.float32(weights[0]) * as_fp32(gathered[0][name])
        for weight, tensors in zip(weights[1:], gathered[1:], strict=True):
            total = total + np.float32(weight) * as_fp32(tensors[name])
        expected = total.view(np.int32) if dtype == torch.float32 else rounded_to_bf16(total)
        assert result[name].dtype == dtype
        assert np.array_equal(bits(result[name]), expected), name
