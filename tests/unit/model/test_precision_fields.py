"""Translation of `precision`: each field exists in the installed megatron-core and has the right value."""

from __future__ import annotations

import pytest

from megatron_cpt.backend import cpu
from megatron_cpt.config import draft_config
from megatron_cpt.errors import UserError
from tests.unit.model.test_capabilities import RUN

cpu.install()

from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.enums import Fp4Recipe, Fp8Recipe  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402

from megatron_cpt.config import Fp8Config  # noqa: E402
from megatron_cpt.model.build_model import _weights_in_fp8  # noqa: E402
from megatron_cpt.model.transformer_config import transformer_config  # noqa: E402


def _config(*overrides: str):
    run = draft_config(dict(RUN), list(overrides)).finish("run.yaml")
    config = transformer_config(run.model, run.parallel, run.precision, run.recompute)
    return run, config


def test_recipes_have_megatron_cores_names():
    recipes = Fp8Config.model_fields["recipe"].annotation.__args__
    assert set(recipes) - {"rowwise"} == {recipe.value for recipe in Fp8Recipe} - {"custom"}
    assert Fp4Recipe.nvfp4.value == "nvfp4"


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
def test_recipe_and_format(recipe, format):
    _, config = _config(f"precision.fp8={{recipe: {recipe}, format: {format}}}")
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (format, recipe, False)
    assert config.fp8_recipe == Fp8Recipe(recipe)  # megatron-core compares with members of the enumeration
    assert not config.first_last_layers_bf16


def test_delayed_scaling():
    _, config = _config("precision.fp8={recipe: delayed, amax_history: 32, amax_compute: most_recent, margin: 2}")
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo, config.fp8_margin) == (32, "most_recent", 2)
    _, config = _config("precision.fp8={recipe: delayed}")
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


@pytest.mark.parametrize("section", ["fp8={recipe: tensorwise, first_last_bf16: 1}", "fp4={first_last_bf16: 1}"])
def test_layers_at_the_ends_stay_in_bf16(section):
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    _, config = _config(f"precision.{section}")
    assert [is_first_last_bf16_layer(config, layer) for layer in range(4)] == [True, False, False, True]


def test_fp4():
    _, config = _config("precision.fp4.recipe=nvfp4")
    assert (config.fp4, config.fp4_recipe, config.fp8) == ("e2m1", Fp4Recipe.nvfp4, None)


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_weights_in_fp8(recipe):
    run, config = _config(f"precision.fp8={{recipe: {recipe}, params: true}}")
    assert config.fp8_param
    ddp = DistributedDataParallelConfig(**_weights_in_fp8(run.precision))
    assert ddp.fp8_param_gather
    assert ddp.reuse_grad_buf_for_mxfp8_param_ag == (recipe == "mxfp8")
    assert _weights_in_fp8(_config("precision.fp8.recipe=delayed")[0].precision) == {}


def test_the_optimizer_knows_the_recipe(monkeypatch):
    from megatron_cpt.optim import build_optimizer

    seen = {}
    monkeypatch.setattr(build_optimizer, "get_megatron_optimizer", lambda config, chunks: seen.update(config=config))
    monkeypatch.setattr(build_optimizer, "install_if_needed", lambda: None)

    def optimizer_config(*overrides: str) -> OptimizerConfig:
        run, _ = _config(*overrides)
        build_optimizer.build_optimizer(run.optimizer, run.schedule, run.parallel, run.precision, [])
        return seen["config"]

    assert optimizer_config("precision.fp8={recipe: tensorwise, params: true}").fp8_recipe == "tensorwise"
    assert optimizer_config("precision.fp8={recipe: mxfp8, params: true}").reuse_grad_buf_for_mxfp8_param_ag
    assert optimizer_config("precision.fp8.backend=emulated").fp8_recipe is None


def test_emulated_fp8_is_not_megatron_cores_business():
    _, config = _config("precision.fp8={backend: emulated, recipe: tensorwise, first_last_bf16: 1}")
    assert (config.fp8, config.first_last_layers_bf16) == (None, False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision={fp8: {recipe: mxfp8}, fp4: {}}"], "precision.fp4: not possible together with precision.fp8"),
        (["precision={compute: fp32, fp4: {}}"], "precision.fp4: needs precision.compute: bf16"),
        (["precision.fp4.first_last_bf16=2"], "at each end leaves none of model.layers: 4 in FP4"),
        (["precision.fp8={backend: emulated, params: true}"], "true: backend emulated keeps its weights"),
        (["precision.fp8={backend: torch, params: true}"], "true: backend torch keeps its weights"),
        (
            ["precision.fp8={backend: torch, recipe: mxfp8}"],
            "backend torch has no mxfp8; choose delayed or tensorwise or r",
        ),
        (["precision.fp8={backend: emulated, recipe: rowwise}"], "backend emulated has no rowwise; choose delayed"),
        (["precision={compute: fp32, fp8: {recipe: rowwise}}"], "precision.fp8: needs precision.compute: bf16"),
        (
            ["precision.fp8.backend=torch", "seq_length=40", "tokens=800"],
            "a micro-batch has 40 tokens per rank, but torch needs a multiple of 16",
        ),
        (["precision.fp8.backend=torch", "model.ffn_hidden=520"], "is 520, but torch needs a multiple of 16"),
        (
            ["precision.fp8.backend=torch", "model.heads=8", "model.kv_groups=1", "model.head_dim=4"],
            r"\(heads \+ 2 kv_groups\) x head_dim / parallel.tensor is 40, but torch needs a multiple of 16",
        ),
        (
            ["optimizer={moments: bf16, betas: [0.9, 0.999]}"],
            r"optimizer.moments: bf16: cannot follow optimizer.betas \[0.9, 0.999\]",
        ),
        (["precision.fp8.params=true", "parallel.distributed_optimizer=false"], "needs parallel.distributed_optimizer"),
        (["precision.fp8.params=true", "model=tiny_llama", "model.ffn_hidden=352"], "first weight of a gated MLP"),
        (
            ["precision.fp8.recipe=delayed", "model.ffn_hidden=520"],
            "model.ffn_hidden / parallel.tensor is 520, .* of 16",
        ),
        (["precision.fp8.recipe=mxfp8", "model.ffn_hidden=528"], "is 528, .* a multiple of 32"),
        (
            ["precision.fp8.recipe=delayed", "seq_length=36", "tokens=720"],
            "a micro-batch has 36 tokens per rank, .* of 8",
        ),
        (
            [
                "precision.fp8.recipe=delayed",
                "seq_length=36",
                "tokens=720",
                "phases.one.batch.micro=2",
                "validation.sources.held=data/held",
            ],
            r"validation \(batch.micro x seq_length\): a micro-batch has 36 tokens",
        ),
        (
            ["documents={reset_attention: true, eod_id: 256}", "parallel.context=2"],
            "documents.reset_attention: not possible with parallel.context: 2",
        ),
    ],
)
def test_what_does_not_go_together(overrides, message):
    with pytest.raises(UserError, match=message):
        draft_config(dict(RUN), overrides).finish("run.yaml")


def test_emulated_fp8_has_no_shapes_to_keep():
    draft_config(dict(RUN), ["precision.fp8.backend=emulated", "model.ffn_hidden=520"]).finish("run.yaml")
