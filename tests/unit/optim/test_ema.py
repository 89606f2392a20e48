"""The moving average of weights on one rank: its arithmetic, and the exchange with the weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_cpt.backend import cpu

cpu.install()

from megatron_cpt.config.schema import EmaConfig  # noqa: E402
from megatron_cpt.optim import ema as module  # noqa: E402
from megatron_cpt.optim.ema import WeightEma  # noqa: E402
from megatron_cpt.optim.owned_weights import OwnedWeight  # noqa: E402

SCALING = "scaling_fwd"


class Chunk(torch.nn.Module):
    """Stand-in for a chunk with a layer of Transformer Engine."""

    ddp_config = SimpleNamespace(overlap_param_gather=False)

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta = {SCALING: SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3)), "recipe": None}
        self.gathers: list[bool] = []

    def start_param_sync(self, *, force_sync: bool) -> None:
        self.gathers.append(force_sync)


def build(monkeypatch: pytest.MonkeyPatch, owned: list[OwnedWeight], *, is_sharded: bool = False, **config: Any) -> Any:
    monkeypatch.setattr(module, "owned_weights", lambda optimizer: owned)
    monkeypatch.setattr(module, "is_sharded", lambda optimizer: is_sharded)
    chunk = Chunk()
    average = WeightEma(EmaConfig(**config), [chunk], None)  # type: ignore[arg-type, list-item]
    average.restart()
    return average, chunk


def fp32_weight(*values: float) -> OwnedWeight:
    parameter = torch.nn.Parameter(torch.tensor(values))
    return OwnedWeight(parameter, 0, len(values), parameter)


def content(average: WeightEma) -> list[float]:
    return [number for _, tensor in average.entries() for number in tensor.tolist()]


def test_it_moves_only_after_steps_that_every_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = fp32_weight(1.0, -8.0)
    average, _ = build(monkeypatch, [weight], decay=0.75, every=3)
    found = []
    for step in range(1, 7):
        weight.parameter.data += 4.0
        average.update(step)
        found.append(content(average))
    # after step 3 the weights are 13 and 4, after step 6 they are 25 and 16
    assert found == [[1, -8], [1, -8], [4, -5], [4, -5], [4, -5], [9.25, 0.25]]


def test_without_memory_it_is_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = fp32_weight(0.1, 1e-30, -3e30)
    average, _ = build(monkeypatch, [weight], decay=0)
    weight.parameter.data.mul_(0.3)
    average.update(1)
    assert content(average) == weight.master.tolist()


def test_a_rank_without_weights_has_an_empty_average(monkeypatch: pytest.MonkeyPatch) -> None:
    average, _ = build(monkeypatch, [])
    average.update(1)
    with average.as_weights():
        pass
    assert content(average) == []


def test_the_exchange_reaches_the_owned_range_only_and_is_undone_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    # weights that are not the master weights, rounded: an import may have loaded both from different tensors
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, float("nan")]], dtype=torch.bfloat16))
    before = parameter.detach().clone()
    owned = OwnedWeight(parameter, 1, 4, torch.tensor([20.0, 30.0 + 2**-10, 40.0]))
    average, chunk = build(monkeypatch, [owned], is_sharded=True)
    scaling = chunk.fp8_meta[SCALING]
    with average.as_weights():
        assert parameter.tolist() == [[1.0, 20.0], [30.0, 40.0]]
        assert chunk.gathers == [True]
        scaling.scale.fill_(7.0)
        scaling.amax_history.fill_(9.0)
    assert parameter.detach().view(torch.int16).equal(before.view(torch.int16))
    assert chunk.gathers == [True, True]
    assert scaling.scale.tolist() == [1, 1, 1]
    assert scaling.amax_history.count_nonzero() == 0
    assert owned.master.tolist() == [20.0, 30.0 + 2**-10, 40.0]
    assert content(average) == owned.master.tolist()


def test_after_an_error_no_collective_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    average, chunk = build(monkeypatch, [fp32_weight(1.0)], is_sharded=True)
    with pytest.raises(KeyError), average.as_weights():
        raise KeyError
    assert chunk.gathers == [True]
