"""Memory, FLOPs and time of a teacher, by exact numbers."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.config import RunConfig, draft_config
from megatron_cpt.planning import build_plan
from megatron_cpt.planning.cluster.step_time import estimate_speed
from megatron_cpt.planning.cost.memory import stage_memory, stage_parameters
from megatron_cpt.planning.cost.rank_layout import Layout
from megatron_cpt.planning.cost.teacher_cost import distilled_share, loss_piece_bytes, teacher_cost, teacher_run
from megatron_cpt.planning.hardware import GPUS

FROM_INIT = ("init.from=start", "teacher={from: init}")


def _config(data: dict[str, Any], *changes: str) -> RunConfig:
    return draft_config(data, changes).finish("run.yaml")


def test_an_equal_model_costs_a_third_of_the_training_flops(run_data: dict[str, Any]) -> None:
    config = _config(run_data, *FROM_INIT)
    plan = build_plan(config, dict.fromkeys(config.sources, 10**6))
    assert plan.teacher is not None
    assert plan.teacher.flops.full == pytest.approx(plan.flops.full / 3)
    assert plan.teacher.parameters == plan.parameters.total
    assert plan.to_dict()["teacher"]["share"] == 1.0
    assert build_plan(_config(run_data), {}).teacher is None


def test_micro_batches_without_a_distilled_source_need_no_teacher(run_data: dict[str, Any]) -> None:
    only_code = ("phases=[{name: a, blend: {web: 3, code: 1}}]", "teacher.sources={web: 0}")
    assert distilled_share(_config(run_data, *FROM_INIT, *only_code, "batch.micro=1")) == 0.25
    config = _config(run_data, *FROM_INIT, *only_code, "batch.micro=2")
    assert distilled_share(config) == 1 - 0.75**2
    cost, whole = teacher_cost(config), teacher_cost(_config(run_data, *FROM_INIT))
    assert cost is not None
    assert whole is not None
    assert cost.flops.full == pytest.approx(whole.flops.full * distilled_share(config))


def test_layers_that_do_not_divide_get_a_layout(run_data: dict[str, Any]) -> None:
    chunks = "parallel={pipeline: 2, virtual_pipeline: 2}"
    config = _config(run_data, *FROM_INIT, chunks)
    assert config.teacher is not None
    run = teacher_run(config, config.model.model_copy(update={"layers": 6}))
    assert run is not None
    assert run.parallel.pipeline_layout == [2, 2, 1, 1]
    same = teacher_run(config)
    assert same is not None
    assert same.parallel.pipeline_layout is None


def test_memory_has_the_weights_everywhere_and_states_and_loss_on_the_last_stage(run_data: dict[str, Any]) -> None:
    changes = ("parallel={pipeline: 2}", "precision.compute=bf16", "batch={global: 8, micro: 2}")
    config, plain = _config(run_data, *FROM_INIT, *changes), _config(run_data, *changes)
    layout = Layout.build(config)
    first, last = (stage_memory(config, layout, stage) for stage in (0, 1))
    assert first.teacher == 2 * stage_parameters(plain, 0)
    tokens, hidden = 2 * config.seq_length, config.model.hidden
    states = (4 + 1) * 2 * tokens * hidden  # 4 micro-batches wait, and one is in the loss; bf16
    piece = 4 * 5 * tokens * config.model.padded_vocab
    assert loss_piece_bytes(config) == piece
    assert last.teacher == 2 * stage_parameters(plain, 1) + states + piece
    assert last.logits == stage_memory(plain, layout, 1).logits / 3, "the logits are overwritten, without an fp32 copy"
    assert stage_memory(plain, layout, 1).teacher == 0


def test_a_teacher_of_one_stage_is_on_the_last_stage(run_data: dict[str, Any]) -> None:
    changes = ("parallel={tensor: 2, pipeline: 2, sequence: true}", "precision.compute=fp32")
    config = _config(run_data, *FROM_INIT, *changes, "teacher.tensor=1", "teacher.pipeline=1")
    layout, plain = Layout.build(config), _config(run_data, "precision.compute=fp32")
    states = (1 + 1) * 4 * config.batch.micro * config.seq_length * config.model.hidden
    assert stage_memory(config, layout, 0).teacher == 0
    assert stage_memory(config, layout, 1).teacher == 4 * stage_parameters(plain, 0) + states + loss_piece_bytes(config)


def test_a_step_takes_the_time_of_the_forward_passes_more(run_data: dict[str, Any]) -> None:
    large = ("model={preset: llama3_8b}", "precision.compute=bf16", "seq_length=4096", "parallel={tensor: 8}")
    config, plain = _config(run_data, *FROM_INIT, *large), _config(run_data, *large)
    layout, gpu = Layout.build(config), GPUS["h100"]
    with_teacher, without = estimate_speed(config, layout, gpu), estimate_speed(plain, layout, gpu)
    assert without.teacher == 0
    assert with_teacher.step - without.step == pytest.approx(with_teacher.teacher)
    work = without.matmul + without.attention + without.memory_bound + without.communication
    assert 0.3 * work < with_teacher.teacher < 0.6 * work
