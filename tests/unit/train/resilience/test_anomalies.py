"""Rules for bad steps, by exact numbers."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_cpt.config.resilience import ResilienceConfig, SpikeConfig
from megatron_cpt.train.resilience.anomalies import Anomaly, find_anomaly, note_loss, reason_to_stop, spike_limit
from megatron_cpt.train.state import TrainState

NAN, INF = math.nan, math.inf


def rule(**fields) -> SpikeConfig:
    return SpikeConfig(**{"action": "skip", "sigma": 3.0, "window": 8, **fields})


def test_the_limit_is_mean_plus_sigma_standard_deviations():
    # mean 3, squared deviations 4, 0, 0, 4: variance 8 / 3 with n - 1
    assert spike_limit([1.0, 3.0, 3.0, 5.0], rule()) == 3.0 + 3.0 * math.sqrt(8 / 3)
    assert spike_limit([2.0, 2.0, 2.0, 2.0], rule()) == 2.0


def test_only_the_window_counts():
    assert spike_limit([100.0] * 5 + [1.0, 3.0, 3.0, 5.0] * 2, rule()) == 3.0 + 3.0 * math.sqrt(16 / 7)


def test_it_says_nothing_before_it_has_enough_losses_or_when_it_is_off():
    assert spike_limit([1.0, 2.0, 3.0], rule()) is None
    assert spike_limit([1.0, 2.0, 3.0], rule(warmup=3)) == 2.0 + 3.0
    assert spike_limit([1.0] * 8, rule(action="off")) is None


@pytest.mark.parametrize("action", ["warn", "skip", "stop"])
def test_a_spike_is_above_the_limit_and_not_at_it(action):
    before, spike = [1.0, 2.0, 3.0], rule(warmup=3, action=action)
    assert find_anomaly(5.0, 1.0, True, before, spike) is None
    found = find_anomaly(math.nextafter(5.0, 6.0), 1.0, True, before, spike)
    assert found == Anomaly("spike", math.nextafter(5.0, 6.0), 5.0, action)
    assert found.is_applied == (action == "warn")


def test_a_loss_far_below_is_no_spike():
    assert find_anomaly(-100.0, 1.0, True, [1.0, 2.0, 3.0], rule(warmup=3)) is None


@pytest.mark.parametrize(
    ("loss", "norm", "is_finite", "kind"),
    [(NAN, 1.0, True, "loss"), (INF, 1.0, True, "loss"), (2.0, NAN, False, "gradient"), (2.0, 1.0, False, "gradient")],
)
def test_what_is_not_finite_is_left_out_whatever_the_rule_for_spikes(loss, norm, is_finite, kind):
    found = find_anomaly(loss, norm, is_finite, [], rule(action="off"))
    assert found is not None
    assert (found.kind, found.is_applied) == (kind, False)


def test_the_counters_and_the_window():
    state, spike = TrainState(), rule(window=4, warmup=2)
    bad, warned = Anomaly("loss", NAN, None, "skip"), Anomaly("spike", 9.0, 8.0, "warn")
    for loss, anomaly in [(1.0, None), (NAN, bad), (NAN, bad), (2.0, None), (9.0, warned), (3.0, None), (4.0, None)]:
        note_loss(state, loss, anomaly, spike)
        if loss == 2.0:
            assert state.skipped_in_a_row == 0
    assert (state.skipped, state.skipped_in_a_row) == (2, 0)
    assert state.recent_losses == [2.0, 9.0, 3.0, 4.0]


def test_a_new_level_is_found_once_and_not_for_ever():
    state, spike = TrainState(), rule(window=16, warmup=8, sigma=6.0)
    found = []
    for step in range(40):
        loss = (1.0 if step < 20 else 5.0) + 0.01 * (step % 3)
        anomaly = find_anomaly(loss, 1.0, True, state.recent_losses, spike)
        note_loss(state, loss, anomaly, spike)
        found += [step] if anomaly else []
    assert found == [20]


def test_the_run_ends_after_n_in_a_row_and_not_before():
    config, bad = ResilienceConfig(stop_after=3), Anomaly("gradient", INF, None, "skip")
    assert reason_to_stop(bad, TrainState(step=7, skipped_in_a_row=2), config) is None
    reason = reason_to_stop(bad, TrainState(step=8, skipped_in_a_row=3), config)
    assert reason is not None
    assert reason.startswith("step 8: 3 updates in a row skipped, this one for a gradient that is not finite (inf); ")


def test_a_spike_ends_the_run_where_it_should():
    reason = reason_to_stop(Anomaly("spike", 9.0, 8.0, "stop"), TrainState(step=8), ResilienceConfig())
    assert reason is not None
    assert reason.startswith("step 8: the loss is 9.0000, above 8.0000; ")


def test_the_state_survives_a_restart_and_older_ones_are_read():
    state = TrainState(3, 96, {"web": 3}, {"sample": 3}, skipped=2, skipped_in_a_row=1, recent_losses=[0.1, 1 / 3])
    assert TrainState.from_dict(state.to_dict()) == state
    older = {key: value for key, value in state.to_dict().items() if not key.startswith(("skipped", "recent"))}
    assert TrainState.from_dict(older) == TrainState(3, 96, {"web": 3}, {"sample": 3})


def test_losses_that_are_no_numbers_stay_out_of_the_mean():
    from megatron_cpt.train.metrics import LossMeter

    meter = LossMeter(["web", "code"], contributes_loss=True)
    meter.add(torch.tensor([[6.0, 2.0], [0.0, 0.0]], dtype=torch.float64), 2, 1.0)
    meter.add(torch.tensor([[NAN, 2.0], [5.0, 1.0]], dtype=torch.float64), 3, 1.0)
    numbers = meter.take()
    assert numbers["loss"] == 3.0
    assert numbers["loss_by_source"] == {"web": 3.0}
