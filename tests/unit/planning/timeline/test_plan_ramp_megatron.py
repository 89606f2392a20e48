"""Batch ramp-up, compared with megatron-core's calculator; a separate file, as importing it takes seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config import BatchConfig, draft_config
from megatron_cpt.planning import build_plan
from megatron_cpt.planning.timeline.segments import batch_size

calculators = pytest.importorskip("megatron.core.num_microbatches_calculator")
if not hasattr(calculators, "RampupBatchsizeNumMicroBatchesCalculator"):
    pytest.skip("megatron-core 0.19 has dropped the calculator", allow_module_level=True)


def calculator_of(batch: BatchConfig) -> Any:
    ramp = batch.ramp_up
    assert ramp is not None
    return calculators.RampupBatchsizeNumMicroBatchesCalculator(
        batch.global_, 1, 1, False, 1, ramp.start, ramp.increment, ramp.samples
    )


def megatron_sizes(batch: BatchConfig) -> Iterator[int]:
    """Return the global batch of every step from megatron-core's calculator, called as in Megatron-LM's loop."""
    calculator, samples = calculator_of(batch), 0
    while True:
        calculator.update(samples, consistency_check=True)
        yield calculator.get_current_global_batch_size()
        samples += calculator.get_current_global_batch_size()


@st.composite
def ramps(draw) -> BatchConfig:
    start, increment, num = draw(st.integers(1, 300)), draw(st.integers(1, 100)), draw(st.integers(1, 12))
    samples = draw(st.integers(1, 20_000))
    ramp = {"start": start, "increment": increment, "samples": samples}
    return BatchConfig.model_validate({"global": start + num * increment, "ramp_up": ramp})


@given(ramps(), st.integers(0, 30_000))
def test_the_size_after_any_number_of_samples_is_megatrons(batch, samples):
    calculator, ramp = calculator_of(batch), batch.ramp_up
    for at in (samples, ramp.samples, ramp.samples - 1, ramp.samples + 1):
        calculator.update(at, consistency_check=False)
        assert batch_size(batch, at) == calculator.get_current_global_batch_size()


@given(batch=ramps(), steps=st.integers(1, 300))
def test_every_step_of_a_plan_has_megatrons_batch(batch, steps):
    data = {
        "name": "x",
        "output": "x",
        "model": "tiny_llama",
        "seq_length": 16,
        "batch": batch.model_dump(by_alias=True),
        "tokens": 16 * sum(itertools.islice(megatron_sizes(batch), steps)),
        "schedule": {"max_lr": 1e-3},
        "sources": {"web": {"path": "web"}},
        "phases": [{"name": "only", "blend": {"web": 1}}],
    }
    found = build_plan(draft_config(data).config, {})
    assert found.steps == steps
    sizes = [found.segment_of(step).global_batch for step in range(1, steps + 1)]
    assert sizes == list(itertools.islice(megatron_sizes(batch), steps))
    assert [found.after(step).samples for step in range(steps + 1)] == [0, *itertools.accumulate(sizes)]
    assert found.phases[0].num_samples == sum(sizes)
