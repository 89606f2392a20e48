"""Bytes in FP8 and FP4, by exact number: of weights, saved inputs and gathered weights."""

from __future__ import annotations

import pytest

from megatron_cpt.config import draft_config
from megatron_cpt.planning import Layout, count_parameters
from megatron_cpt.planning.cluster.communication import GradientExchange, Links
from megatron_cpt.planning.cluster.step_time import estimate_speed
from megatron_cpt.planning.cost.activations import layer_activation_bytes
from megatron_cpt.planning.cost.formats import quantized_layers
from megatron_cpt.planning.cost.memory import stage_memory
from megatron_cpt.planning.hardware import B200, H100

HIDDEN, FFN = 128, 512
TOKENS = 64 * 2
LINKS = Links(tensor=1.0, context=1.0, data=1.0, pipeline=1.0)


@pytest.fixture
def run_of(run_data):
    def build(*overrides):
        draft = draft_config(run_data, overrides)
        assert draft.problems == []
        return draft.config

    return build


def weights(run, gpu=None, stage=0):
    return stage_memory(run, Layout.build(run), stage, gpu=gpu).weights


@pytest.mark.parametrize(
    ("precision", "on_h100", "on_b200"),
    [
        ("fp8: {recipe: delayed}", 2, 1),
        ("fp8: {recipe: tensorwise}", 2, 1),
        ("fp8: {recipe: delayed, params: true}", 0, -1),
        ("fp8: {recipe: blockwise}", 2 * (1 + 4 / 16_384), 2 * (1 + 4 / 16_384)),
        ("fp8: {recipe: mxfp8}", 2 * 33 / 32, 2 * 33 / 32),
        ("fp8: {recipe: mxfp8, params: true}", 2 / 32, 2 / 32),
        ("fp4: {}", 2 * 9 / 16, 2 * 9 / 16),
        ("fp8: {backend: emulated}", 0, 0),
        ("fp8: {backend: torch}", 0, 0),
        ("fp8: {recipe: rowwise}", 0, 0),
    ],
)
def test_bytes_per_quantized_weight(run_of, precision, on_h100, on_b200):
    plain, low = run_of(), run_of(f"precision={{{precision}}}")
    linear = 4 * count_parameters(plain.model).layer.matmul
    assert weights(low, H100) - weights(plain, H100) == pytest.approx(on_h100 * linear)
    assert weights(low, B200) - weights(plain, B200) == pytest.approx(on_b200 * linear)
    assert weights(low) == weights(low, H100)


@pytest.mark.parametrize(
    ("precision", "kept"),
    [("fp8: {recipe: tensorwise}", 1), ("fp8: {recipe: blockwise}", 33 / 32), ("fp4: {}", 9 / 16)],
)
def test_bytes_of_saved_inputs(run_of, precision, kept):
    """Outputs of two norms and the activation shrink from 2 bytes; attention also saves its output in FP8."""
    plain, low = run_of(), run_of(f"precision={{{precision}}}")
    saved = (2 - kept) * (2 * HIDDEN + FFN) - kept * HIDDEN
    assert layer_activation_bytes(plain) - layer_activation_bytes(low) == pytest.approx(saved * TOKENS)


@pytest.mark.parametrize(("recipe", "kept"), [("tensorwise", 1), ("delayed", 1), ("rowwise", 2)])
def test_bytes_of_inputs_saved_by_torch(run_of, recipe, kept):
    """The layers are the local ones; one factor per row needs the input itself."""
    plain, low = run_of(), run_of(f"precision.fp8={{backend: torch, recipe: {recipe}}}")
    saved = (2 - kept) * (2 * HIDDEN + FFN) - (kept * HIDDEN if kept < 2 else 0)
    assert layer_activation_bytes(plain, spec="local") - layer_activation_bytes(low) == pytest.approx(saved * TOKENS)


def test_torch_multiplies_as_fast_as_transformer_engine_and_casts_weights_more_often(run_of):
    te, ours, bf16 = (
        estimate_speed(run, Layout.build(run), H100)
        for run in (run_of("precision.fp8.recipe=tensorwise"), run_of("precision.fp8.backend=torch"), run_of())
    )
    assert ours.matmul == te.matmul < bf16.matmul
    assert ours.memory_bound > te.memory_bound


@pytest.mark.parametrize(("recipe", "gathered"), [("delayed", 1), ("tensorwise", 1), ("blockwise", 1), ("mxfp8", 2)])
def test_weights_are_gathered_in_their_format(run_of, recipe, gathered):
    run = run_of(f"precision.fp8={{recipe: {recipe}, params: true}}")
    bf16 = run_of(f"precision.fp8={{recipe: {recipe}}}")
    layout, linear = Layout.build(run, 4), 4 * count_parameters(run.model).layer.matmul
    one, other = (GradientExchange.build(config, layout, LINKS, 0) for config in (run, bf16))
    assert other.gather - one.gather == pytest.approx((2 - gathered) * linear * 3 / 4)
    assert one.reduce == other.reduce


@pytest.mark.parametrize(
    ("parallel", "by_stage"),
    [
        ("{}", [2]),
        ("{pipeline: 2}", [1, 1]),
        ("{pipeline: 4}", [0, 1, 1, 0]),
        ("{pipeline: 2, virtual_pipeline: 2}", [1, 1]),
    ],
)
def test_layers_at_the_ends_stay_in_bf16(run_of, parallel, by_stage):
    overrides = [f"parallel={parallel}", "precision.fp8={recipe: tensorwise, first_last_bf16: 1}"]
    run, plain = run_of(*overrides), run_of(*overrides, "precision.fp8=null")
    stages = range(len(by_stage))
    assert [quantized_layers(run, stage) for stage in stages] == by_stage
    assert quantized_layers(plain, 0) == 0
    layer = count_parameters(run.model).layer.matmul
    extra = [weights(run, stage=stage) - weights(plain, stage=stage) for stage in stages]
    assert extra == pytest.approx([2 * layers * layer for layers in by_stage])


def test_layers_in_bf16_take_the_time_of_bf16(run_of):
    whole, half, none = (
        estimate_speed(run, Layout.build(run), H100)
        for run in (
            run_of("precision.fp8.recipe=tensorwise"),
            run_of("precision.fp8={recipe: tensorwise, first_last_bf16: 1}"),
            run_of(),
        )
    )
    assert half.matmul == pytest.approx((whole.matmul + none.matmul) / 2)
