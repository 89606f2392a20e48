"""`parallel.pipeline_layout` as megatron-core reads it: layers and offset of every stage and chunk."""

from __future__ import annotations

import pytest

from megatron_cpt.backend import cpu
from megatron_cpt.config import draft_config
from tests.unit.model.test_capabilities import RUN

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout  # noqa: E402

from megatron_cpt.model.transformer_config import transformer_config  # noqa: E402
from megatron_cpt.planning.cost.rank_layout import stage_chunks  # noqa: E402


def _run(*overrides: str):
    return draft_config(dict(RUN), list(overrides)).finish("run.yaml")


def _layout(run) -> PipelineParallelLayerLayout | None:
    return transformer_config(run.model, run.parallel, run.precision, run.recompute).pipeline_model_parallel_layout


@pytest.mark.parametrize(
    "parallel",
    [
        "{pipeline: 2, pipeline_layout: [3, 1]}",
        "{pipeline: 3, pipeline_layout: [0, 4, 0]}",
        "{pipeline: 2, virtual_pipeline: 2, pipeline_layout: [2, 1, 1, 0]}",
    ],
)
def test_planner_and_megatron_core_agree_on_the_layers(monkeypatch, parallel):
    run = _run(f"parallel={parallel}")
    layout = _layout(run)
    virtual = run.parallel.virtual_pipeline if run.parallel.virtual_pipeline > 1 else None
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: virtual)
    for stage in range(run.parallel.pipeline):
        chunks = [
            layout.get_layer_id_list(vp_stage=chunk, pp_rank=stage) for chunk in range(run.parallel.virtual_pipeline)
        ]
        assert chunks == [list(chunk) for chunk in stage_chunks(run, stage)]


@pytest.mark.parametrize(("written", "text"), [("[3, 1]", "Et*3|tL"), ("[4, 0]", "Et*4|L"), ("[0, 4]", "E|t*4L")])
def test_a_list_is_a_layout_string_of_megatron_core(written, text):
    run = _run(f"parallel={{pipeline: 2, pipeline_layout: {written}}}")
    assert _layout(run).layout == PipelineParallelLayerLayout(text, 2).layout


def test_equal_stages_keep_megatron_cores_own_split():
    assert _layout(_run("parallel={pipeline: 2}")) is None
    assert _layout(_run("parallel={pipeline: 1, pipeline_layout: [4]}")) is None
