"""The adviser: its ranking for Nemotron-4 15B, its reasons and its texts."""

from __future__ import annotations

import io
import shlex
from itertools import pairwise

import pytest

from megatron_cpt.config import draft_config, load_config
from megatron_cpt.errors import UserError
from megatron_cpt.planning import GIB, Layout, build_plan
from megatron_cpt.planning.cluster.advise import AS_GOOD, advise
from megatron_cpt.planning.cluster.estimate import (
    MEMORY_MARGIN,
    find_gpu,
    fits,
    largest_segment,
    place_on_cluster,
)
from megatron_cpt.planning.cluster.step_time import estimate_speed
from megatron_cpt.planning.cost.memory import stage_memories
from megatron_cpt.planning.hardware import A100, B200, H100, H200
from megatron_cpt.planning.run_plan import with_shape
from megatron_cpt.views.advice_table import render_advice, render_cluster

ONE_STAGE = ["parallel={pipeline: 1, virtual_pipeline: 1, pipeline_layout: null}"]
PUBLISHED = {"bf16": 6159, "fp8": 8275}  # NVIDIA dgxc-benchmarking v25.04: TP2 PP1 MBS2 on 16 to 64 H100


def largest_memory(run, layout, gpu):
    return max(stage_memories(run, layout, gpu=gpu), key=lambda memory: memory.total)


def config(data, *overrides):
    draft = draft_config(data, overrides)
    assert draft.problems == []
    return draft.config


@pytest.fixture
def nemotron(repository):
    def load(*overrides):
        return load_config(repository / "examples" / "nemotron4_15b" / "run.yaml", overrides)

    return load


def advice_for(run, num_gpus, gpu, found={}):  # noqa: B006 - several tests ask for the same advice
    key = (run.model_dump_json(), num_gpus, gpu.name)
    if key not in found:
        found[key] = advise(run, build_plan(run, {}), num_gpus, gpu)
    return found[key]


def rendered(render, found) -> str:
    stream = io.StringIO()
    render(found, stream)
    return stream.getvalue()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize(("num_gpus", "batch"), [(64, 1152), (512, 2048)])
def test_the_published_split_is_as_good_as_the_first(nemotron, precision, num_gpus, batch):
    fp8 = ["precision.fp8={}"] if precision == "fp8" else []
    advice = advice_for(nemotron(f"batch.global={batch}", *fp8), num_gpus, H100)
    speeds = {candidate.split: candidate.speed.tokens_per_gpu for candidate in advice.ranking}
    assert speeds["TP2 PP1"] >= AS_GOOD * advice.ranking[0].speed.tokens_per_gpu
    assert speeds["TP2 PP1"] == pytest.approx(PUBLISHED[precision], rel=0.15)


@pytest.mark.parametrize("fp8", ["null", "{}"])
def test_more_context_parallelism_is_ranked_where_it_buys_something(nemotron, fp8):
    speeds = {}
    for candidate in advice_for(nemotron(f"precision.fp8={fp8}"), 64, H100).ranking:
        parallel = candidate.config.parallel
        by_context = speeds.setdefault((parallel.tensor, parallel.pipeline), {})
        by_context[parallel.context] = candidate.speed.tokens_per_gpu
    for by_context in speeds.values():
        ordered = [by_context[context] for context in sorted(by_context)]
        assert all(more > 1.01 * less for less, more in pairwise(ordered))


def test_the_ranking_names_its_knobs(nemotron):
    advice = advice_for(nemotron(), 64, H100)
    by_split = {candidate.split: candidate for candidate in advice.ranking}
    assert "speed.tp_comm_overlap=true" in by_split["TP2 PP1"].overrides
    assert by_split["TP2 PP1"].plain.tokens_per_gpu < by_split["TP2 PP1"].speed.tokens_per_gpu
    assert by_split["TP1 PP2"].plain is None
    assert not any("tp_comm_overlap" in override for override in by_split["TP1 PP2"].overrides)
    # the estimate of the run's own layout has the knob at its default, off
    assert "tp_comm_overlap" not in advice.current.knobs
    assert advice.current_overlapped.tokens_per_gpu > advice.current.speed.tokens_per_gpu
    text = rendered(render_advice, advice)
    assert "knobs: speed.tp_comm_overlap=true where TP is above 1" in text
    assert f"with speed.tp_comm_overlap=true {advice.current_overlapped.tokens_per_gpu:,.0f}" in " ".join(text.split())


def test_a_knob_set_to_false_stays_off_in_the_ranking(nemotron):
    advice = advice_for(nemotron("speed.tp_comm_overlap=false"), 64, H100)
    assert all(candidate.plain is None for candidate in advice.ranking)
    assert "speed.tp_comm_overlap=false" in advice.ranking[0].overrides
    assert advice.current_overlapped is None
    other = {candidate.split: candidate for candidate in advice_for(nemotron(), 64, H100).ranking}
    mine = {candidate.split: candidate for candidate in advice.ranking}
    assert mine["TP2 PP1"].speed.tokens_per_gpu == pytest.approx(other["TP2 PP1"].plain.tokens_per_gpu)


def test_a_knob_that_needs_one_shape_is_not_taken_where_phases_differ(nemotron):
    """Check the whole run: each phase alone has a single shape."""
    run = nemotron("phases.qa.seq_length=16384", "phases.qa.batch={global: 288}", *ONE_STAGE)
    assert all(candidate.plain is None for candidate in advice_for(run, 64, H100).ranking)
    cluster = place_on_cluster(run, build_plan(run, {}), H100, 64)
    assert cluster.overlapped is None
    assert "tp_comm_overlap" not in cluster.knobs


def test_user_buffers_take_memory(nemotron):
    """Expect 12 buffers of 8,192 tokens x 6,144; with FP8 the 8 for gathers have one byte per element."""
    layout = ["parallel={tensor: 2, pipeline: 1, sequence: true}"]
    asked = [*layout, "speed.tp_comm_overlap=true"]
    for fp8, size in [([], 24), (["precision.fp8={}"], 16)]:
        plain, run = nemotron(*layout, *fp8), nemotron(*asked, *fp8)
        less, more = (largest_memory(one, Layout.build(one, 64), gpu=H100).reserved for one in (plain, run))
        assert more - less == size * 2 * 4096 * 6144


def test_ranked_layouts_run_and_fit(nemotron):
    advice = advice_for(nemotron(), 64, H100)
    speeds = [candidate.speed.tokens_per_gpu for candidate in advice.ranking]
    assert speeds == sorted(speeds, reverse=True)
    for candidate in advice.ranking:
        # the overrides alone select the layout: they pass every check and give the same estimate
        run = nemotron(*candidate.overrides)
        memory = largest_memory(run, Layout.build(run, 64), gpu=H100)
        assert memory.total == candidate.memory.total <= (1 - MEMORY_MARGIN) * 79.6 * GIB
        assert candidate.layout.data_parallel * run.parallel.model_parallel_size == 64
        assert candidate.why


@pytest.mark.parametrize(
    ("num_gpus", "shapes"),
    [
        (64, ["phases.qa.seq_length=16384", "phases.qa.batch={global: 288}"]),
        (64, ["phases.qa.seq_length=16384", "phases.qa.batch={global: 288, micro: 1}", "batch.ramp_up=null"]),
        (256, ["batch.ramp_up={start: 192, increment: 192, samples: 5M}"]),
    ],
)
def test_ranked_layouts_fit_in_every_step(nemotron, num_gpus, shapes):
    run = nemotron(*shapes)
    advice = advice_for(run, num_gpus, H100)
    assert advice.ranking
    assert not advice.is_uniform
    assert (advice.steps.global_batch, advice.steps.seq_length) == (1152, 4096)
    for candidate in advice.ranking:
        chosen = nemotron(*shapes, *candidate.overrides)
        plan = build_plan(chosen, {}, num_gpus=num_gpus)
        assert plan.problems == ()
        assert fits(place_on_cluster(chosen, plan, H100, num_gpus).memory, H100)
    assert advice.other_batch is None
    assert "speed: in steps of 1,152 x 4,096 tokens" in rendered(render_advice, advice)


def test_overrides_set_all_fields_of_recomputation(nemotron):
    """Ranked layouts replace the recomputation of run.yaml, so their overrides must set all its fields."""
    shapes = ["seq_length=32768", "batch.global=128", "recompute={granularity: full, method: block, num_layers: 3}"]
    full = [
        candidate
        for candidate in advice_for(nemotron(*shapes), 16, H100).ranking
        if candidate.config.recompute.granularity == "full"
    ]
    assert full
    for candidate in full:
        assert nemotron(*shapes, *candidate.overrides).recompute == candidate.config.recompute


EQUAL_STAGES = ["parallel={tensor: 8, pipeline: 4, sequence: true, pipeline_layout: null, virtual_pipeline: 1}"]


def test_the_run_s_own_layout_is_judged(nemotron):
    advice = advice_for(nemotron(*EQUAL_STAGES, "recompute.granularity=selective"), 64, H100)
    assert advice.current.split == "TP8 PP4"
    assert advice.current.speed.tokens_per_gpu < advice.ranking[0].speed.tokens_per_gpu
    text = rendered(render_advice, advice)
    assert "this run's own layout, TP8 PP4 MBS2 selective recompute: about" in text
    assert "slowest stage" in text  # the head of 256,000 ids


def test_the_example_has_tensor_and_pipeline_parallelism_and_is_as_good_as_the_first(nemotron):
    run = nemotron()
    assert min(run.parallel.tensor, run.parallel.pipeline) > 1
    advice = advice_for(run, 64, H100)
    assert advice.current_problem == ""
    first = advice.ranking[0]
    assert advice.current_overlapped.tokens_per_gpu > AS_GOOD * first.speed.tokens_per_gpu
    assert advice.current.speed.tokens_per_gpu > AS_GOOD * first.plain.tokens_per_gpu
    assert place_on_cluster(run, build_plan(run, {}), H100, 64).hints == ()


def test_a_plan_proposes_balanced_stages(nemotron):
    """The proposed layout has the predicted speed, and is no longer worth a hint."""
    run = nemotron(*EQUAL_STAGES)
    cluster = place_on_cluster(run, build_plan(run, {}), H100, 64)
    (hint,) = cluster.hints
    proposed = "parallel.pipeline_layout=[8,9,9,6]"
    assert proposed in hint
    balanced = nemotron(*EQUAL_STAGES, proposed)
    better = place_on_cluster(balanced, build_plan(balanced, {}), H100, 64)
    assert f"gives about {better.speed.tokens_per_gpu:,.0f} tokens/s/GPU" in hint
    assert f"{better.memory.total / GIB:.1f} GiB" in hint
    assert better.speed.tokens_per_gpu > 1.1 * cluster.speed.tokens_per_gpu
    assert better.hints == ()
    assert cluster.to_dict()["hints"] == [hint]
    assert "hint" in rendered(render_cluster, cluster)


def test_a_plan_names_recomputation_that_frees_nothing(nemotron):
    run = nemotron("recompute.granularity=selective")
    cluster = place_on_cluster(run, build_plan(run, {}), H100, 64)
    (hint,) = cluster.hints
    assert f"recompute.granularity=none saves about {cluster.speed.recompute / cluster.speed.step:.1%}" in hint
    without = place_on_cluster(nemotron(), build_plan(run, {}), H100, 64)
    assert without.memory.total == pytest.approx(cluster.memory.total, rel=0.01)


def test_why_a_split_does_not_fit(nemotron):
    reasons = advice_for(nemotron(), 512, H100).misfits
    assert "batch.global: 1152 is not a multiple of batch.micro: 1 x 256 replicas" in reasons["TP2 PP1"]
    reasons = advice_for(nemotron(), 64, H100).misfits
    assert reasons["TP1 PP1"].endswith("73 are usable, even with micro-batch 1, recompute full")


def test_another_batch_is_named_where_it_is_faster(nemotron):
    advice = advice_for(nemotron(), 512, H100)
    assert advice.other_batch.split == "TP2 PP1"
    assert advice.other_batch.config.batch.global_ == 1024
    assert "batch.global=1024 would allow TP2 PP1" in rendered(render_advice, advice)
    assert advice_for(nemotron(), 64, H100).other_batch is None


def test_a_layout_that_does_not_divide_is_reported(nemotron):
    advice = advice_for(nemotron(), 6, H200)
    assert advice.current is None
    assert "6 ranks: not a multiple" in advice.current_problem
    assert "this run's own layout: 6 ranks: not a multiple" in rendered(render_advice, advice)


def test_nothing_fits(nemotron):
    advice = advice_for(nemotron("parallel={tensor: 1, pipeline: 1}"), 1, H100)
    assert advice.ranking == []
    assert "GiB" in advice.current_problem
    assert "no layout fits" in rendered(render_advice, advice)


def test_long_sequences_get_context_parallelism(nemotron):
    advice = advice_for(nemotron("seq_length=131072", "batch.global=64"), 64, H100)
    assert advice.ranking[0].config.parallel.context > 1
    short = advice_for(nemotron(), 64, H100)
    as_good = AS_GOOD * short.ranking[0].speed.tokens_per_gpu
    fast = [candidate for candidate in short.ranking if candidate.speed.tokens_per_gpu >= as_good]
    assert all(candidate.config.parallel.context == 1 for candidate in fast)


def test_a_large_vocabulary_gets_a_short_last_stage(nemotron):
    """Expect pipelines to lose next to nothing to their slowest stage; with equal stages they lose a tenth or more."""
    by_split = {candidate.split: candidate for candidate in advice_for(nemotron(), 64, H100).ranking}
    for split in ("TP2 PP2", "TP4 PP4"):
        candidate = by_split[split]
        layout = candidate.config.parallel.pipeline_layout
        assert sum(layout) == 32
        # the head is as long as four layers
        assert layout[-1] < layout[0]
        assert candidate.speed.uneven / candidate.speed.step < 0.02
        virtual = candidate.config.parallel.virtual_pipeline
        parallel = [f"parallel.{key}={getattr(candidate.config.parallel, key)}" for key in ("tensor", "pipeline")]
        run = nemotron(*parallel, "parallel.virtual_pipeline=1", "parallel.pipeline_layout=null")
        even = estimate_speed(run, Layout.build(run, 64), H100)
        assert even.uneven / even.step > 0.08
        assert f"'parallel.pipeline_layout=[{','.join(map(str, layout))}]'" in shlex.join(candidate.overrides)
        assert candidate.to_dict()["pipeline_layout"] == layout
        assert len(layout) == run.parallel.pipeline * virtual


def test_a_small_vocabulary_keeps_equal_stages(nemotron):
    advice = advice_for(nemotron("model.vocab=8192"), 64, H100)
    first = next(candidate for candidate in advice.ranking if candidate.config.parallel.pipeline > 1)
    assert first.config.parallel.pipeline_layout is None


def test_a_number_of_layers_that_nothing_divides_gets_pipelines(nemotron):
    advice = advice_for(nemotron("model.layers=31", *ONE_STAGE), 64, H100)
    by_split = {candidate.split: candidate for candidate in advice.ranking}
    assert sum(by_split["TP2 PP4"].config.parallel.pipeline_layout) == 31


def test_gpus_that_were_not_calibrated_are_marked(nemotron):
    assert "not measured" in rendered(render_advice, advice_for(nemotron(), 64, B200))
    assert "not measured" not in rendered(render_advice, advice_for(nemotron(), 64, H100))
    assert "one H200 took 3 to 4 % longer" in rendered(render_advice, advice_for(nemotron(), 64, H200))


def test_find_gpu(run_data):
    run = config(run_data, "precision.fp8={}")
    assert find_gpu("H100", run) is H100
    with pytest.raises(UserError, match="choose one of a100, h100, h200, b200"):
        find_gpu("tpu", run)
    with pytest.raises(UserError, match="has no FP8"):
        find_gpu("a100", run)
    with pytest.raises(UserError, match=r"precision.fp4: .* precision.fp4=null"):
        find_gpu("b200", config(run_data, "precision.fp4={}"))
    assert find_gpu("a100", config(run_data)) is A100
    assert find_gpu("a100", config(run_data, "precision.fp8={backend: emulated}")) is A100


SIZES = {"web": 1_000_000, "code": 500_000, "qa": 20_000}


def test_time_and_gpu_hours(run_data):
    run = config(run_data)
    cluster = place_on_cluster(run, build_plan(run, SIZES), H100, 4)
    assert cluster.seconds == pytest.approx(100 * cluster.speed.step)
    assert cluster.gpu_hours == pytest.approx(cluster.seconds * 4 / 3600)
    assert cluster.mfu(cluster.flops.full) == pytest.approx(
        8 * 64 * cluster.flops.full / (4 * 989e12 * cluster.speed.step)
    )
    values = cluster.to_dict()
    assert sum(values["step_seconds_by_part"].values()) == pytest.approx(values["step_seconds"])
    assert values["fits"] == fits(cluster.memory, H100) is True
    text = rendered(render_cluster, cluster)
    assert "fits" in text
    assert "with Transformer Engine: fused_activation, " in text


def test_a_run_of_several_shapes(run_data):
    run_data["phases"][1] |= {"seq_length": 128, "batch": {"global": 4, "micro": 1}}
    run = config(run_data)
    plan = build_plan(run, SIZES)
    most = largest_segment(plan)
    assert (most.seq_length, most.global_batch) == (64, 8)
    cluster = place_on_cluster(run, plan, H100, 1)
    steps = [phase.last_step - phase.first_step + 1 for phase in plan.phases]
    runs = [with_shape(run, phase.segments[0]) for phase in plan.phases]
    seconds = [estimate_speed(one, Layout.build(one, 1), H100).step for one in runs]
    assert seconds[0] != seconds[1]
    assert cluster.seconds == pytest.approx(steps[0] * seconds[0] + steps[1] * seconds[1])
    memories = [largest_memory(one, Layout.build(one, 1), gpu=H100).total for one in runs]
    assert cluster.memory.total == max(memories)
