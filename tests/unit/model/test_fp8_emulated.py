"""FP8 values and scaling factors by exact numbers; whole runs are in tests/distributed/test_fp8.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.backend import cpu

cpu.install()

from megatron_cpt.model.fp8_emulated import (  # noqa: E402  # megatron-core must be imported after the CPU backend
    GRADIENT,
    INPUT,
    WEIGHT,
    LocalFp8,
    quantize,
    scale_for,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (1.0, E4M3, 1.0),
        (1.0624, E4M3, 1.0),  # three bits of fraction: steps of an eighth, 1.0625 is halfway
        (1.07, E4M3, 1.125),
        (448.0, E4M3, 448.0),
        (1e6, E4M3, 448.0),  # saturates where a plain cast gives NaN
        (-1e6, E4M3, -448.0),
        (2.0**-9, E4M3, 2.0**-9),  # the smallest
        (2.0**-10, E4M3, 0.0),  # halfway to it: to even
        (1.2, E5M2, 1.25),  # two bits of fraction
        (1e9, E5M2, 57344.0),
        (2.0**-16, E5M2, 2.0**-16),
        (2.0**-18, E5M2, 0.0),
    ],
)
def test_a_value_becomes_its_nearest_in_fp8(value, dtype, expected):
    assert quantize(torch.tensor([value]), ONE, dtype).item() == expected


def test_the_scale_moves_the_window():
    small = torch.tensor([2.0**-12])
    assert quantize(small, ONE, E4M3).item() == 0.0
    assert quantize(small, torch.tensor(2.0**6), E4M3).item() == 2.0**-12


@given(st.floats(2.0**-60, 2.0**60), st.sampled_from([E4M3, E5M2]), st.integers(0, 4))
def test_the_largest_value_stays_and_the_rest_is_close(amax, dtype, margin):
    amax = torch.tensor(amax, dtype=torch.float32)
    scale = scale_for(amax, dtype, margin)
    assert amax * scale <= torch.finfo(dtype).max / 2.0**margin * (1 + 1e-6)
    x = torch.linspace(-1, 1, 101) * amax
    step = 2.0**-4 if dtype is E4M3 else 2.0**-3  # half a unit in the last place, relative
    smallest = torch.finfo(dtype).smallest_normal / scale
    error = (quantize(x, scale, dtype) - x).abs()
    assert (error <= torch.maximum(x.abs(), smallest) * step * (1 + 1e-5)).all()


@pytest.mark.parametrize("amax", [0.0, float("inf"), float("nan"), 1e-45])
def test_a_maximum_that_says_nothing_gives_no_scale(amax):
    assert scale_for(torch.tensor([amax]), E4M3).item() == 1.0


def test_exact_scales():
    assert scale_for(torch.tensor(7.0), E4M3).item() == 64.0
    assert scale_for(torch.tensor(7.0), E4M3, margin=3).item() == 8.0
    assert scale_for(torch.tensor(2.0), E5M2).item() == 28672.0


@pytest.mark.parametrize(("format", "gradient"), [("hybrid", E5M2), ("e4m3", E4M3)])
def test_formats_of_the_operands(format, gradient):
    recipe = LocalFp8("delayed", format)
    assert [recipe.dtype(operand) for operand in (INPUT, WEIGHT, GRADIENT)] == [E4M3, E4M3, gradient]
