"""The speed model: exact numbers of its parts, and its error against published runs."""

from __future__ import annotations

import math

import pytest

from benchmarks.adviser_accuracy import compare, markdown, summarize
from megatron_cpt.config import draft_config
from megatron_cpt.planning import Layout
from megatron_cpt.planning.cluster.communication import (
    NETWORK_EFFICIENCY,
    NVLINK_EFFICIENCY,
    GradientExchange,
    Links,
    context_seconds_per_layer,
    pipeline_seconds,
    tensor_seconds_per_layer,
)
from megatron_cpt.planning.cluster.step_time import SECONDS_PER_DOUBLING, Overlap, estimate_speed, with_tensor_overlap
from megatron_cpt.planning.cost.memory import stage_parameters
from megatron_cpt.planning.hardware import GPUS, H100, H200

PARTS = ("matmul", "attention", "memory_bound", "recompute", "communication", "uneven", "bubble", "exchange")
PARTS += ("optimizer", "scale")


def config(data, *overrides):
    draft = draft_config(data, overrides)
    assert draft.problems == []
    return draft.config


@pytest.fixture
def big(run_data):
    """Nemotron-4 15B with 64 sequences of 4,096 tokens per step."""
    run_data |= {"model": {"preset": "nemotron4_15b"}, "seq_length": 4096, "batch": {"global": 64, "micro": 2}}
    return run_data | {"tokens": "1B"}


def speed(run, num_gpus, gpu=H100, overlap=None):
    return estimate_speed(run, Layout.build(run, num_gpus), gpu, overlap)


def test_published_runs_are_predicted():
    rows = compare()
    summary = summarize(rows)
    assert summary["held_out"] >= 30
    assert summary["fitted_worst"] < 0.01
    assert summary["held_out_mean"] < 0.05
    assert summary["other_models_mean"] < 0.06
    assert summary["held_out_worst"] < 0.15


def test_the_document_shows_the_errors_of_this_model(repository):
    text = (repository / "docs" / "internals" / "adviser.md").read_text(encoding="utf-8")
    assert "\n".join(markdown(compare())) in text


def test_the_parts_make_up_the_step(big):
    run = config(big, "parallel={tensor: 2, pipeline: 4, sequence: true}", "recompute.granularity=full")
    found = speed(run, 64)
    assert sum(getattr(found, part) for part in PARTS) == pytest.approx(found.step)
    assert all(getattr(found, part) >= 0 for part in PARTS)
    assert found.tokens_per_gpu == pytest.approx(64 * 4096 / found.step / 64)


def test_links_are_the_network_where_a_group_leaves_the_node(big):
    run = config(big, "parallel={tensor: 2, pipeline: 2, sequence: true}")
    inside, across = Links.build(run, Layout.build(run, 8), H100), Links.build(run, Layout.build(run, 64), H100)
    nvlink, adapter = NVLINK_EFFICIENCY * 450e9, NETWORK_EFFICIENCY * 50e9
    assert (inside.tensor, inside.data, inside.pipeline) == (nvlink, nvlink, nvlink)
    # at TP2 four ranks of a data-parallel group share a node, and its ring leaves it over their four adapters
    assert (across.tensor, across.data, across.pipeline) == (nvlink, 4 * adapter, adapter)


def test_volumes_of_communication(big):
    run = config(big, "parallel={tensor: 2, pipeline: 2, context: 2, sequence: true}")
    links = Links(tensor=1.0, context=1.0, data=1.0, pipeline=1.0)
    hidden = 2 * 6144 * 2 * 4096 / 2  # bytes of the residual stream of a micro-batch on a context-parallel rank
    assert tensor_seconds_per_layer(run, links) == 8 * hidden / 2
    assert pipeline_seconds(run, links) == 2 * hidden / 2
    assert context_seconds_per_layer(run, links) == 3 * hidden * (2 * 8 * 128 / 6144) / 2
    layout = Layout.build(run, 32)
    exchange = GradientExchange.build(run, layout, links, 0)
    parameters, share = stage_parameters(run, 0), 7 / 8  # 4 data-parallel x 2 context-parallel ranks
    assert (exchange.reduce, exchange.gather) == (4 * parameters * share, 2 * parameters * share)
    plain = config(big, "parallel={tensor: 2, pipeline: 2, context: 2, distributed_optimizer: false}")
    exchange = GradientExchange.build(plain, layout, links, 0)
    assert (exchange.reduce, exchange.gather) == (2 * 4 * parameters * share, 0)


def test_even_stages_wait_as_long_as_the_formula_says(big):
    """(p - 1) / (m v) of the work, Narayanan et al., arXiv 2104.04473."""
    small_head = ["model.vocab=128", "model.vocab_multiple=8"]
    for virtual in (1, 4):
        parallel = f"parallel={{tensor: 2, pipeline: 4, virtual_pipeline: {virtual}, sequence: true}}"
        found = speed(config(big, parallel, *small_head), 64)
        work = found.matmul + found.attention + found.memory_bound + found.communication
        assert found.bubble / work == pytest.approx(3 / (4 * virtual), rel=0.01)
        assert found.uneven / work < 0.01


def test_a_large_vocabulary_makes_the_last_stage_slow(big):
    found = speed(config(big, "parallel={tensor: 2, pipeline: 4, sequence: true}"), 64)
    work = found.matmul + found.attention + found.memory_bound + found.communication
    # four stages of 8 layers with 390 M weights each, and a head of 1,573 M on the last
    layers, head = 8 * 390.07, 1572.9
    expected = 1 - (layers + head / 4) / (layers + head)
    assert found.uneven / (work + found.uneven) == pytest.approx(expected, abs=0.01)


def test_what_recomputation_costs(big):
    base = config(big, "parallel={tensor: 2, sequence: true}")
    none, selective, full = (
        speed(config(big, "parallel={tensor: 2, sequence: true}", f"recompute.granularity={granularity}"), 64)
        for granularity in ("none", "selective", "full")
    )
    assert none == speed(base, 64)
    assert selective.recompute == pytest.approx(selective.attention * 2 / 7)
    assert full.recompute / none.step == pytest.approx(0.3, abs=0.04)


def test_overlap_hides_communication(big):
    run = config(big, "parallel={tensor: 4, sequence: true}", "batch.micro=1")
    hidden, seen = (
        speed(run, 64, overlap=Overlap()),
        speed(run, 64, overlap=Overlap(tensor=False, gradients=False, weights=False)),
    )
    assert seen.communication == pytest.approx(4 * hidden.communication)
    assert seen.exchange > hidden.exchange
    halved = speed(run, 64, overlap=Overlap(gradients=False, weights=False, gradient_bytes=2))
    assert seen.exchange == pytest.approx(halved.exchange * 6 / 4)


@pytest.mark.parametrize(
    ("overrides", "tensor", "gradients", "weights"),
    [
        ([], False, True, True),
        (["speed.tp_comm_overlap=true"], True, True, True),
        (["speed.overlap_param_gather=false"], False, True, False),
        (["speed.overlap_grad_reduce=false"], False, False, False),
        (["precision.fp8={recipe: mxfp8, params: true}"], False, True, False),
    ],
)
def test_overlap_follows_the_options_of_the_run(big, overrides, tensor, gradients, weights):
    run = config(big, "parallel={tensor: 2, sequence: true}", *overrides)
    assert Overlap.of(run) == Overlap(tensor, gradients, weights)
    assert speed(run, 64) == speed(run, 64, overlap=Overlap(tensor, gradients, weights))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel={tensor: 2, sequence: true}"], True),
        (["parallel={tensor: 2, sequence: true}", "speed.tp_comm_overlap=false"], False),
        (["parallel={tensor: 2, sequence: true}", "phases.qa.seq_length=8192"], None),
        (["parallel={tensor: 2, sequence: true}", "precision.fp8.recipe=blockwise"], None),
        (["parallel.tensor=2"], None),
        ([], None),
        (["speed.tp_comm_overlap=true"], False),  # an error on one rank
    ],
)
def test_tensor_overlap_is_on_if_possible(big, overrides, said):
    run = config(big, *overrides)
    assert with_tensor_overlap(run).speed.tp_comm_overlap is said
    assert with_tensor_overlap(run).model_copy(update={"speed": run.speed}) == run


def test_scale_grows_with_the_number_of_nodes(big):
    run = config(big, "parallel={tensor: 2, sequence: true}", "batch.global=2048")
    assert speed(run, 8).scale == 0
    assert speed(run, 256).scale == pytest.approx(5 * SECONDS_PER_DOUBLING)


def test_faster_hardware_is_faster(big):
    run = config(big, "parallel={tensor: 2, sequence: true}")
    bf16 = {name: speed(run, 64, gpu).tokens_per_gpu for name, gpu in GPUS.items()}
    assert bf16["a100"] < bf16["h100"] < bf16["h200"] < bf16["b200"]
    fp8 = config(big, "parallel={tensor: 2, sequence: true}", "precision.fp8={}")
    assert 1.2 < speed(fp8, 64).tokens_per_gpu / bf16["h100"] < 1.45
    assert speed(fp8, 64, GPUS["a100"]).tokens_per_gpu == pytest.approx(bf16["a100"])  # it has no FP8


def test_gpu_figures_have_plausible_units():
    for gpu in GPUS.values():
        assert 1e14 < gpu.bf16 < 1e16
        assert gpu.fp8 is None or gpu.fp8 == pytest.approx(2 * gpu.bf16, rel=0.01)
        assert gpu.network < gpu.nvlink < gpu.hbm
    assert H200.bf16 == H100.bf16
    assert math.isclose(H100.hbm, 3.35e12)
