"""FP8 products by torch: equal to the products of the same quantized operands, and to the emulation."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from megatron_cpt.backend import cpu, process_groups
from megatron_cpt.config import draft_config
from tests.unit.model.test_capabilities import RUN

cpu.install()

from megatron.core.tensor_parallel import ColumnParallelLinear  # noqa: E402

from megatron_cpt.model import fp8_torch  # noqa: E402
from megatron_cpt.model.fp8_emulated import INPUT, EmulatedFp8, LocalFp8, end_step, quantize, scale_for  # noqa: E402
from megatron_cpt.model.fp8_torch import (  # noqa: E402
    Quantized,
    TorchFp8,
    cast,
    cast_along,
    column_major,
    row_major,
    scaled_product,
)
from megatron_cpt.model.transformer_config import transformer_config  # noqa: E402

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOKENS, INPUTS, OUTPUTS = 48, 32, 64


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    with process_groups(draft_config(dict(RUN), []).finish("run.yaml").parallel):
        yield


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _exact(quantized: Quantized) -> torch.Tensor:
    return quantized.values.double() * quantized.inverse_scale.double()


def _linear(kind, recipe: str, *, dtype: str = "fp32", **options) -> torch.nn.Module:
    """Return a column-parallel layer of `kind`, whose weight is the same for every kind."""
    run = draft_config(dict(RUN), [f"precision.compute={dtype}"]).finish("run.yaml")
    config = transformer_config(run.model, run.parallel, run.precision, run.recompute)
    cls = kind.linears(LocalFp8(recipe, history=4, **options))[0] if kind is not None else ColumnParallelLinear
    layer = cls(
        INPUTS, OUTPUTS, config=config, init_method=lambda weight: weight, bias=False, skip_bias_add=True,
        gather_output=False,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(_random(OUTPUTS, INPUTS, seed=1))
    return layer


def _compute(layer: torch.nn.Module, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return the result of a layer and the gradients of its input and weight, for the same values every time."""
    x = _random(TOKENS // 2, 2, INPUTS, dtype=dtype, seed=2).requires_grad_()
    output = layer(x)[0]
    layer.weight.grad = None
    output.backward(_random(*output.shape, dtype=dtype, seed=3) * 1e-4)
    return output.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("left", [E4M3, E5M2])
@pytest.mark.parametrize("by", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_torchs_operator(left, by, dtype):
    """On a CPU `scaled_product` computes the product itself, because torch's operator takes seconds there."""
    a, b = _random(16, 32) * 3, _random(32, 48, seed=1)
    if by == "row":
        operands = row_major(cast_along(a, 1, left)), column_major(cast_along(b, 0, E4M3))
        assert operands[0].inverse_scale.shape == (16, 1)
        assert operands[1].inverse_scale.shape == (1, 48)
    else:
        scales = scale_for(a.abs().amax(), left), scale_for(b.abs().amax(), E4M3)
        operands = row_major(cast(a, scales[0], left)), column_major(cast(b, scales[1], E4M3))
    assert operands[0].values.is_contiguous()
    assert operands[1].values.t().is_contiguous()
    ours = scaled_product(*operands, dtype=dtype)
    (x, x_scale), (y, y_scale) = operands
    real = torch._scaled_mm(x, y, scale_a=x_scale, scale_b=y_scale, out_dtype=dtype, use_fast_accum=True)
    exact = _exact(operands[0]) @ _exact(operands[1])
    rounding = 1e-5 if dtype is torch.float32 else 2**-8
    for product in (ours, real):
        assert product.dtype is dtype
        torch.testing.assert_close(product.double(), exact, rtol=rounding, atol=rounding * exact.abs().max().item() / 4)


@pytest.mark.parametrize("shapes", [((16, 24), (24, 16)), ((16, 32), (32, 40))], ids=["inner", "columns"])
def test_sizes_that_cublas_refuses_are_refused_by_name(shapes):
    left, right = (cast(_random(*shape), torch.tensor(1.0), E4M3) for shape in shapes)
    with pytest.raises(ValueError, match=r"precision\.fp8\.backend: torch: .* not a multiple of 16"):
        scaled_product(left, column_major(right), dtype=torch.float32)


def test_a_cast_saturates_and_keeps_the_emulations_values():
    x = _random(32, 32) * torch.logspace(-6, 6, 32)
    scale = torch.tensor(3.0)
    assert torch.equal(cast(x, scale, E4M3).values.float() / scale, quantize(x, scale, E4M3))
    assert cast(x, scale, E4M3).values.float().isfinite().all()


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
def test_a_layer_computes_what_the_emulation_computes(recipe, format):
    real, reference = (_linear(kind, recipe, format=format) for kind in (TorchFp8, EmulatedFp8))
    for _ in range(3):  # delayed scales differ from 1 from the second step on
        for ours, theirs in zip(_compute(real), _compute(reference), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        if recipe == "delayed":
            end_step([real, reference])
            assert torch.equal(real.amax_history, reference.amax_history)
            assert real.amax_history[:, 0].min() > 0


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_gradients_are_near_those_of_bf16(recipe):
    fp8 = _compute(_linear(TorchFp8, recipe, dtype="bf16"), torch.bfloat16)
    bf16 = _compute(_linear(None, recipe, dtype="bf16"), torch.bfloat16)
    for ours, plain in zip(fp8, bf16, strict=True):
        assert ours.dtype is torch.bfloat16
        assert 0 < (ours.float() - plain.float()).norm() / plain.float().norm() < 0.08


def test_a_row_of_small_values_keeps_its_precision_with_a_factor_of_its_own():
    x = _random(16, 32)
    x[3] *= 1e-6
    whole, by_row = cast(x, scale_for(x.abs().amax(), E4M3), E4M3), cast_along(x, 1, E4M3)
    assert not _exact(whole)[3].any()
    torch.testing.assert_close(_exact(by_row)[3].float(), x[3], rtol=2**-4, atol=1e-8)


def test_the_input_is_saved_in_one_byte_per_value():
    layer = _linear(TorchFp8, "tensorwise")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        layer(_random(TOKENS // 2, 2, INPUTS).requires_grad_())
    sizes = {tensor.numel(): tensor.dtype for tensor in saved}
    assert sizes[TOKENS * INPUTS] is LocalFp8("tensorwise").dtype(INPUT)


def test_weight_gradients_are_added_to_the_fp32_buffer():
    layer = _linear(TorchFp8, "tensorwise")
    plain = _compute(layer)[2]
    layer.gradient_accumulation_fusion = True
    layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.ones_like(plain), False
    _compute(layer)
    torch.testing.assert_close(layer.weight.main_grad, plain + 1)
    assert layer.weight.grad_added_to_main_grad is True


def test_the_named_group_is_not_used_without_parallelism():
    layer = _linear(TorchFp8, "tensorwise")
    layer.tp_group = SimpleNamespace(size=lambda: 1)  # any collective call with it would fail
    _compute(layer)


class _Context:
    """Context of an autograd function whose two halves are called by hand."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_torch_accepts_every_operand_for_a_gpu(recipe, monkeypatch):
    """On tensors without values torch checks types, sizes, order of elements and scales as for a GPU."""
    layer = SimpleNamespace(fp8=LocalFp8(recipe), scale_of=lambda x, operand: scale_for(x.abs().amax(), E4M3))
    products = []
    operator = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *x, **named: products.append(named) or operator(*x, **named))
    x, weight = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in ((24, 2, 32), (64, 32)))
    context = _Context()
    with torch.no_grad():
        output = fp8_torch._Fp8Linear.forward(context, x, weight, layer, None, None, False)
        of_x, of_weight, *_ = fp8_torch._Fp8Linear.backward(context, torch.empty_like(output))
    assert (output.shape, of_x.shape, of_weight.shape) == ((24, 2, 64), x.shape, weight.shape)
    assert [product["use_fast_accum"] for product in products] == [True, False, False]
    row_major_right = torch.empty(32, 64, device="meta", dtype=E4M3)
    with pytest.raises(RuntimeError, match=r"must be row_major"):
        operator(row_major_right.t(), row_major_right, **products[0])
