"""Adam with moments in bf16: updates in fp32, moments rounded to nearest."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_cpt.backend import cpu
from megatron_cpt.checkpoint.state.optimizer_shards import _create_missing_moments
from megatron_cpt.optim.group_step_adam import Bf16MomentsAdam, GroupStepAdam, bf16_moments

cpu.install()

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 6


def _parameter(seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))


def _step(optimizer: GroupStepAdam, number: int) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        generator = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    optimizer.step()


def test_moments_are_rounded_after_an_update_in_fp32() -> None:
    """The reference rounds the moments of Adam in fp32 after each step, so the next one starts from them."""
    parameter, reference = _parameter(), _parameter()
    ours, theirs = Bf16MomentsAdam([parameter], **OPTIONS), GroupStepAdam([reference], **OPTIONS)
    for number in range(STEPS):
        _step(ours, number)
        _step(theirs, number)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = theirs.state[reference][name]
            moment.copy_(moment.bfloat16())
            assert ours.state[parameter][name].dtype is torch.bfloat16
            assert torch.equal(ours.state[parameter][name].float(), moment)
        assert torch.equal(parameter, reference)


def test_updates_stay_near_those_of_fp32() -> None:
    parameter, reference = _parameter(), _parameter()
    ours, theirs = Bf16MomentsAdam([parameter], **OPTIONS), GroupStepAdam([reference], **OPTIONS)
    for number in range(20):
        _step(ours, number)
        _step(theirs, number)
    moved = (reference - _parameter()).norm()
    assert 0 < (parameter - reference).norm() < 0.01 * moved


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_loaded_state_continues_bit_for_bit_in_its_own_format(moments: torch.dtype) -> None:
    cls = Bf16MomentsAdam if moments is torch.bfloat16 else GroupStepAdam
    parameter = _parameter()
    whole = cls([parameter], **OPTIONS)
    for number in range(3):
        _step(whole, number)
    resumed_parameter = torch.nn.Parameter(parameter.detach().clone())
    resumed = cls([resumed_parameter], **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert resumed.state[resumed_parameter]["exp_avg"].dtype is moments
    for number in range(3, STEPS):
        _step(whole, number)
        _step(resumed, number)
    assert torch.equal(parameter, resumed_parameter)
    assert torch.equal(whole.state[parameter]["exp_avg_sq"], resumed.state[resumed_parameter]["exp_avg_sq"])


def test_rates_above_the_limit_would_never_decay() -> None:
    """`config/precision_checks.py` refuses them: the second moment of zero gradients must shrink."""
    for beta, shrinks in ((0.999, False), (0.95, True)):
        parameter = _parameter()
        optimizer = Bf16MomentsAdam([parameter], **{**OPTIONS, "betas": (0.9, beta)})
        _step(optimizer, 0)
        before = optimizer.state[parameter]["exp_avg_sq"].clone()
        for _ in range(10):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        assert torch.equal(before, optimizer.state[parameter]["exp_avg_sq"]) is not shrinks


def test_megatron_core_gets_its_own_adam_back() -> None:
    import megatron.core.optimizer as mcore_optimizer
    from megatron.core.optimizer import distrib_optimizer

    before = mcore_optimizer.Adam, distrib_optimizer.Adam
    with bf16_moments(True):
        assert mcore_optimizer.Adam is distrib_optimizer.Adam is Bf16MomentsAdam
    assert (mcore_optimizer.Adam, distrib_optimizer.Adam) == before
    with bf16_moments(False):
        assert (mcore_optimizer.Adam, distrib_optimizer.Adam) == before


@pytest.mark.parametrize("cls", [GroupStepAdam, Bf16MomentsAdam])
def test_moments_created_for_a_save_before_the_first_update_have_the_optimizer_s_format(cls: type) -> None:
    parameter = _parameter()
    optimizer = cls([parameter], **OPTIONS)
    _create_missing_moments(optimizer)
    assert {moment.dtype for moment in optimizer.state[parameter].values()} == {cls.moments}
    assert not any(moment.any() for moment in optimizer.state[parameter].values())
