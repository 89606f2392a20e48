"""Clipping gives the numbers of megatron-core's function, bit for bit."""

from __future__ import annotations

import pytest
import torch

from megatron_cpt.backend import cpu

cpu.install()

from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402

from megatron_cpt.optim.update import _clip  # noqa: E402


@pytest.mark.parametrize("max_norm", [0.3, 1.0, 1e9], ids=["clipped", "default", "not clipped"])
def test_gradients_are_those_of_megatron_core(max_norm: float) -> None:
    gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in ((3, 5), (129,), (64, 64))]
    both: list[list[torch.nn.Parameter]] = [[], []]
    for parameters in both:
        for gradient in gradients:
            parameters.append(torch.nn.Parameter(torch.zeros_like(gradient)))
            parameters[-1].grad = gradient.clone()
        parameters.append(torch.nn.Parameter(torch.zeros(2)))  # without a gradient
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    clip_grad_by_total_norm_fp32(both[0], max_norm=max_norm, total_norm=norm)
    _clip(both[1], max_norm, norm)
    for theirs, ours in zip(*both, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    assert torch.equal(both[1][0].grad, gradients[0]) == (max_norm > norm)
