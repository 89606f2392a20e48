"""The table of speed knobs: defaults per machine, settings in megatron-core, copy in docs/operations/speed.md."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from megatron_cpt.backend import cpu
from megatron_cpt.config import RunConfig, draft_config
from megatron_cpt.config.compute import SpeedConfig
from megatron_cpt.config.knobs import KNOBS, ComputePlace, knobs_table, resolve_speed
from megatron_cpt.errors import UserError
from megatron_cpt.launch.environment import variables_table
from tests.unit.model.test_capabilities import H100, H100_BARE, LAPTOP, RUN
from tools.dev.docs_pages import insert_speed_tables

cpu.install()

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402

from megatron_cpt.model.kernel_options import choose_knobs, ddp_fields  # noqa: E402
from megatron_cpt.model.transformer_config import squared_relu, transformer_config  # noqa: E402

ROOT = Path(__file__).parents[3]
CPU, GPU, H100_TE = ComputePlace(), ComputePlace(on_gpu=True), ComputePlace(on_gpu=True, transformer_engine=True)
CONTAINER = ComputePlace(on_gpu=True, transformer_engine=True, adds_gradients=True)
ANYWHERE = {"overlap_grad_reduce", "overlap_param_gather", "fused_cross_entropy"}


def _run(*overrides: str) -> RunConfig:
    return draft_config(dict(RUN), list(overrides)).finish("run.yaml")


def _on(place: ComputePlace, *overrides: str) -> frozenset[str]:
    on, problems = resolve_speed(_run(*overrides), place)
    assert problems == []
    return on


def _fields(*overrides: str, knobs: frozenset[str]):
    run = _run(*overrides)
    return transformer_config(run.model, run.parallel, run.precision, run.recompute, knobs)


def test_every_key_has_its_line():
    assert [knob.name for knob in KNOBS] == list(SpeedConfig.model_fields)


@pytest.mark.parametrize(
    ("place", "on"),
    [
        (CPU, set()),
        (GPU, {*ANYWHERE, "fused_activation", "fused_bias_dropout"}),
        (
            dataclasses.replace(GPU, adds_gradients=True),
            {*ANYWHERE, "fused_activation", "fused_bias_dropout", "fused_grad_accumulation"},
        ),
        (H100_TE, {*ANYWHERE, "fused_activation", "fused_bias_dropout", "fused_rope", "fused_grad_accumulation"}),
        (CONTAINER, {*ANYWHERE, "fused_activation", "fused_bias_dropout", "fused_rope", "fused_grad_accumulation"}),
    ],
)
def test_defaults_of_a_place(place, on):
    assert _on(place) == on


def test_defaults_step_back_where_they_are_not_valid():
    assert "overlap_param_gather" not in _on(H100_TE, "parallel.distributed_optimizer=false")
    assert "overlap_param_gather" not in _on(H100_TE, "speed.overlap_grad_reduce=false")
    assert "overlap_param_gather" not in _on(H100_TE, "precision.fp8={recipe: mxfp8, params: true}")
    assert "overlap_param_gather" in _on(H100_TE, "precision.fp8={recipe: delayed, params: true}")
    assert "fused_cross_entropy" not in _on(H100_TE, "precision.compute=fp32")


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_what_a_run_says_counts(knob):
    off = [] if knob.name != "overlap_grad_reduce" else ["speed.overlap_param_gather=false"]
    assert knob.name not in _on(CONTAINER, f"speed.{knob.name}=false", *off)
    layout = ["parallel.tensor=2", "parallel.sequence=true"]
    assert knob.name in _on(CONTAINER, f"speed.{knob.name}=true", *layout)


@pytest.mark.parametrize(
    ("place", "overrides", "message"),
    [
        (
            CPU,
            ["speed.fused_rope=true"],
            "speed.fused_rope: needs a CUDA device and Transformer Engine; remove it here",
        ),
        (CPU, ["speed.overlap_param_gather=true"], "overlap_param_gather: needs speed.overlap_grad_reduce: true"),
        (GPU, ["speed.fused_grad_accumulation=true"], "needs Transformer Engine, Apex, or a torch that adds"),
        (H100_TE, ["speed.tp_comm_overlap=true"], "needs parallel.tensor above 1 and parallel.sequence"),
        (
            H100_TE,
            [
                "speed.tp_comm_overlap=true",
                "parallel.tensor=2",
                "parallel.sequence=true",
                "phases=[{name: one, blend: {a: 1.0}, seq_length: 128}]",
            ],
            "needs the same seq_length and batch.micro in every phase",
        ),
        *(
            (
                H100_TE,
                ["speed.tp_comm_overlap=true", "parallel={tensor: 2, sequence: true}", f"precision={{{precision}}}"],
                "tp_comm_overlap: needs neither blockwise FP8 nor FP4",
            )
            for precision in ("fp8: {recipe: blockwise}", "fp4: {}")
        ),
        (CPU, ["speed.fused_cross_entropy=true", "precision.compute=fp32"], "needs precision.compute: bf16"),
    ],
)
def test_what_cannot_be_is_refused(place, overrides, message):
    _, problems = resolve_speed(_run(*overrides), place)
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_a_machine_is_a_place():
    assert choose_knobs(_run(), H100, transformer_engine=True) == _on(H100_TE)
    assert choose_knobs(_run(), H100_BARE, transformer_engine=False) == _on(GPU)
    with pytest.raises(UserError, match=r"speed\.fused_rope: needs"):
        choose_knobs(_run("speed.fused_rope=true"), LAPTOP, transformer_engine=False)


def test_knobs_in_megatron_cores_words():
    config = _fields(knobs=frozenset({"fused_bias_dropout", "fused_cross_entropy", "fused_grad_accumulation"}))
    assert config.bias_dropout_fusion
    assert config.gradient_accumulation_fusion
    assert (config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl) == (True, "native")
    assert not config.apply_rope_fusion
    assert _fields(knobs=frozenset({"tp_comm_overlap"})).tp_comm_overlap
    plain = _fields(knobs=frozenset())
    assert not any((plain.bias_dropout_fusion, plain.cross_entropy_loss_fusion, plain.tp_comm_overlap))


def test_only_swiglu_goes_through_megatron_cores_fused_activation():
    on = frozenset({"fused_activation"})
    swiglu = _fields("model=tiny_llama", knobs=on)
    assert swiglu.bias_activation_fusion
    assert swiglu.activation_func is torch.nn.functional.silu  # megatron-core compares with this function
    assert not _fields("model=tiny_llama", knobs=frozenset()).bias_activation_fusion
    x = torch.linspace(-3, 3, 13)
    for name in ("squared_relu", "gelu", "gelu_tanh"):
        fused, plain = (_fields(f"model.activation={name}", knobs=knobs) for knobs in (on, frozenset()))
        assert not fused.bias_activation_fusion
        torch.testing.assert_close(
            fused.activation_func(x), plain.activation_func(x)
        )  # the compiled kernel rounds differently
    assert _fields(knobs=frozenset()).activation_func is squared_relu


def test_overlap_in_ddps_words():
    run = _run()
    ddp = DistributedDataParallelConfig(**ddp_fields({"overlap_grad_reduce", "overlap_param_gather"}, run.parallel))
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather, ddp.use_distributed_optimizer) == (True, True, True)
    ddp = DistributedDataParallelConfig(**ddp_fields(set(), run.parallel))
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather) == (False, False)


def test_the_page_shows_the_tables():
    page = insert_speed_tables((ROOT / "docs" / "operations" / "speed.md").read_text(encoding="utf-8"))
    assert knobs_table() in page
    assert variables_table() in page
