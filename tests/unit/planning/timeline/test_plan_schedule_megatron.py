"""Learning rates, compared with megatron-core's scheduler; a separate file, as importing it takes seconds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_cpt.planning import Schedule


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 13])
@pytest.mark.parametrize("decay_shape", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_rates_are_those_of_megatron_core(shape, warmup, decay_shape):
    scheduler = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    ours = Schedule(shape, 1e-3, 1e-5, 100, warmup_steps=warmup, decay_steps=30, decay_shape=decay_shape)

    theirs = scheduler.OptimizerParamScheduler(
        SimpleNamespace(param_groups=[]),
        init_lr=0.0,
        max_lr=ours.max_lr,
        min_lr=ours.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=ours.steps,
        lr_decay_style="WSD" if shape == "wsd" else shape,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=30,
        lr_wsd_decay_style=decay_shape,
    )
    expected = []
    for _ in range(ours.steps):  # Megatron-LM sets the rate of a step by the steps before it
        expected.append(theirs.get_lr({}))
        theirs.step(1)
    assert ours.rates(range(1, ours.steps + 1)) == pytest.approx(expected, rel=1e-12, abs=1e-20)
