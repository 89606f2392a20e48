"""The real Transformer Engine on a CPU: layers, names and shapes of weights, FP8 state, checkpoints.

Its kernels need a GPU, so nothing is computed. Layers are built in the CPU's memory: Transformer Engine sees a CUDA
device, and everything else sees a machine without one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine: make test-fake-gpu")

from megatron_cpt.backend import cpu, process_groups, seed_everything
from megatron_cpt.config import RunConfig, draft_config

cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.fp8_utils import get_fp8_recipe  # noqa: E402

from megatron_cpt.checkpoint.loading.load import load_training, load_weights  # noqa: E402
from megatron_cpt.checkpoint.record import SavedRun  # noqa: E402
from megatron_cpt.checkpoint.state import state_dicts  # noqa: E402
from megatron_cpt.checkpoint.state.fp8_history import is_te_layer  # noqa: E402
from megatron_cpt.convert.mapping.names import stored_name  # noqa: E402
from megatron_cpt.convert.mapping.shapes import expected_tensors  # noqa: E402
from megatron_cpt.model import build_model  # noqa: E402
from megatron_cpt.model.build_model import Model  # noqa: E402
from megatron_cpt.model.capabilities import Machine, read_machine  # noqa: E402
from megatron_cpt.model.kernel_options import initialize_user_buffers  # noqa: E402
from megatron_cpt.optim.build_optimizer import build_optimizer  # noqa: E402
from tests.helpers.checkpoints import differing, read_tensors  # noqa: E402
from tests.unit.model.test_capabilities import RUN  # noqa: E402

HISTORY = 16
# FP8 needs widths in multiples of 16; tiny_llama has a ffn_hidden of 344.
PRESETS = {"tiny_nemotron": [], "tiny_llama": ["model.ffn_hidden=352"]}
FP8 = {
    "bf16": [],
    "delayed": [f"precision.fp8={{recipe: delayed, amax_history: {HISTORY}}}"],
    "tensorwise": ["precision.fp8={recipe: tensorwise}"],
    "blockwise": ["precision.fp8={recipe: blockwise}"],
    "ends in bf16": ["precision.fp8={recipe: tensorwise, first_last_bf16: 1}"],
}
KNOBS = {
    "packed documents": ["documents={reset_attention: true, eod_id: 256}"],
    "biases": ["model.qkv_bias=true", "model.linear_bias=true"],
    "qk norm": ["model.qk_norm=true"],
    "full recompute": ["recompute={granularity: full}"],
    "selective recompute": ["recompute.granularity=selective"],
    "fp32": ["precision.compute=fp32"],
}
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def _cuda_for_transformer_engine() -> bool:
    return str(sys._getframe(1).f_globals["__name__"]).startswith("transformer_engine")


@pytest.fixture(scope="module", autouse=True)
def transformer_engine() -> Iterator[Machine]:
    """An H100 with the installed Transformer Engine."""
    import transformer_engine

    version = tuple(map(int, transformer_engine.__version__.split(".")[:2]))
    machine = Machine("NVIDIA H100 80GB HBM3", (9, 0), (13, 0), version)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", _cuda_for_transformer_engine)
        patch.setattr(build_model, "read_machine", lambda: machine)
        yield machine


def _run(preset: str, *overrides: str) -> RunConfig:
    options = [f"model.preset={preset}", "precision.compute=bf16", *PRESETS[preset], *overrides]
    return draft_config({**RUN, "model": {}}, options).finish("run.yaml")


@contextlib.contextmanager
def _model(run: RunConfig, *, local: bool = False) -> Iterator[Model]:
    with process_groups(run.parallel), pytest.MonkeyPatch.context() as patch:
        if local:
            patch.setattr(build_model, "read_machine", Machine)
        seed_everything(run.seed, pipeline_rank=0)
        model = build_model.build_model(run)
        assert model.spec == ("local" if local else "transformer_engine")
        yield model


def _stored_shapes(run: RunConfig) -> dict[str, tuple[int, ...]]:
    """Return what conversion writes: keys and shapes of a torch_dist checkpoint."""
    shapes = {}
    for name, shape in expected_tensors(run.model).items():
        key, layer = stored_name(name)
        shapes[key] = shape if layer is None else (run.model.layers, *shape)
    return shapes


def _save(model: Model, folder: Path, optimizer: Any = None) -> SavedRun:
    folder.mkdir()
    state = state_dicts.model_state(model.chunks)
    if optimizer is not None:
        state = state_dicts.training_state(model.chunks, optimizer, is_loading=False, with_rng=False)
    dist_checkpointing.save(state, str(folder))
    return SavedRun(folder, manifest={}, state={}, run={})


def _build_optimizer(run: RunConfig, model: Model) -> Any:
    """Return the optimizer, with random moments and master weights as after a step."""
    optimizer = build_optimizer(run.optimizer, run.schedule, run.parallel, run.precision, model.chunks)
    state = state_dicts.training_state(model.chunks, optimizer, is_loading=True, with_rng=False)
    generator = torch.Generator().manual_seed(run.seed)
    for entry in nested_values(state["optimizer"]):
        if isinstance(entry, ShardedTensor):
            entry.data.copy_(torch.rand(entry.data.shape, generator=generator))
    for group in optimizer.param_groups:
        group["step"] = 7
    return optimizer


def _moments(model: Model, optimizer: Any) -> dict[str, torch.Tensor]:
    """Return what the optimizer itself holds, by the keys of a checkpoint: moments and master weights."""
    state = state_dicts.training_state(model.chunks, optimizer, is_loading=False, with_rng=False)["optimizer"]
    tensors = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
    return {f"{entry.key} {entry.global_offset}": entry.data.clone() for entry in tensors}


def _saved_tensors(run: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Build a model, save it, and return what the checkpoint holds."""
    with _model(run) as model:
        _save(model, folder)
    return read_tensors(folder)


def test_the_machine_of_this_process_has_no_gpu() -> None:
    assert read_machine() == Machine()


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_checkpoint_has_the_tensors_that_conversion_expects(preset: str, recipe: str, tmp_path: Path) -> None:
    run = _run(preset, *FP8[recipe])
    tensors = _saved_tensors(run, tmp_path / "te")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == _stored_shapes(run)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("options", KNOBS)
@pytest.mark.parametrize("preset", PRESETS)
def test_all_settings_build(preset: str, options: str, tmp_path: Path) -> None:
    run = _run(preset, *KNOBS[options])
    shapes = {name: tuple(tensor.shape) for name, tensor in _saved_tensors(run, tmp_path / "te").items()}
    assert shapes == _stored_shapes(run)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_checkpoint_moves_between_the_layer_specs(preset: str, tmp_path: Path) -> None:
    run, other = _run(preset), _run(preset, "seed=2")
    with _model(run) as model:
        te = _save(model, tmp_path / "te")
    with _model(other, local=True) as model:
        assert differing(tmp_path / "te", _save(model, tmp_path / "before").path)
        load_weights(te, model.chunks, "none")
        local = _save(model, tmp_path / "local")
    assert not differing(tmp_path / "te", tmp_path / "local")
    with _model(other) as model:
        load_weights(local, model.chunks, "none")
        _save(model, tmp_path / "again")
    assert not differing(tmp_path / "te", tmp_path / "again")


@pytest.mark.parametrize("sources", [(False, True), (True, False), (False, False)], ids=str)
def test_the_optimizer_moves_between_the_layer_specs(sources: tuple[bool, bool], tmp_path: Path) -> None:
    """Transformer Engine's FusedAdam and torch's kernels have states of one layout, loaded in place."""
    from_local, to_local = sources
    run, other = _run("tiny_llama"), _run("tiny_llama", "seed=2")
    with _model(run, local=from_local) as model:
        optimizer = _build_optimizer(run, model)
        expected = _moments(model, optimizer)
        saved = _save(model, tmp_path / "saved", optimizer)
    with _model(other, local=to_local) as model:
        optimizer = _build_optimizer(other, model)
        load_training(saved, model.chunks, optimizer, "none", with_rng=False)
        loaded = _moments(model, optimizer)
        assert {group["step"] for group in optimizer.param_groups} == {7}
    assert expected.keys() == loaded.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, loaded[key])] == []


def _linears(model: Model) -> dict[str, Any]:
    """Return the linear layers, whose products are in FP8; attention is not."""
    return {name: module for name, module in model.chunks[0].named_modules() if name.endswith(LINEARS)}


def _fill_histories(model: Model) -> None:
    """Fill scaling factors and histories with different numbers per layer, as forward and backward passes do."""
    state_dicts.model_state(model.chunks, is_loading=True)  # creates them
    for number, layer in enumerate(_linears(model).values()):
        for way, key in enumerate(("scaling_fwd", "scaling_bwd")):
            layer.fp8_meta[key].scale += number + 100 * way
            layer.fp8_meta[key].amax_history += torch.arange(HISTORY)[:, None] + number


def _histories(model: Model) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key} {field}": getattr(layer.fp8_meta[key], field).clone()
        for name, layer in _linears(model).items()
        for key in ("scaling_fwd", "scaling_bwd")
        for field in ("scale", "amax_history")
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_histories_of_delayed_scaling_come_back(preset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run = _run(preset, *FP8["delayed"])
    with _model(run) as model:
        bf16 = _save(model, tmp_path / "before the first step")
        _fill_histories(model)
        expected = _histories(model)
        saved = _save(model, tmp_path / "saved")
    layers = run.model.layers
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(saved.path).items() if "fp8" in name}
    assert shapes == {
        f"decoder.layers.{linear}.fp8_{way}.amax_history": (layers, HISTORY + 1, num_tensors)
        for linear in LINEARS
        for way, num_tensors in (("forward", 3), ("backward", 2))
    }
    with _model(run) as model:
        load_weights(saved, model.chunks, "none")
        loaded = _histories(model)
        assert "FP8 scaling starts from scratch" not in caplog.text
    assert expected.keys() == loaded.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, loaded[name])] == []
    with _model(run) as model:
        load_weights(bf16, model.chunks, "none")
        assert "FP8 scaling starts from scratch" in caplog.text


def test_no_pickle_of_transformer_engine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
    from transformer_engine.pytorch.ops.op import BasicOperation

    run = _run("tiny_nemotron", *FP8["delayed"])
    with _model(run) as model:
        _fill_histories(model)
        saved = _save(model, tmp_path / "saved")
        extra = {
            name: entry.data
            for name, entry in state_dicts.model_state(model.chunks)["model0"].items()
            if name.endswith("_extra_state")
        }
    assert {data.numel() for data in extra.values()} == {0}, "written empty"
    received: list[Any] = []
    for kind in (TransformerEngineBaseModule, BasicOperation):
        monkeypatch.setattr(kind, "set_extra_state", lambda self, state: received.append(state))
    with _model(run) as model:
        load_weights(saved, model.chunks, "none")
    assert [state for state in received if state is not None] == []


def test_linear_layers_are_known_as_layers_with_scaling_factors() -> None:
    with _model(_run("tiny_llama")) as model:
        assert len(_linears(model)) == model.config.num_layers * len(LINEARS)
        assert all(is_te_layer(layer) for layer in _linears(model).values())


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [("delayed", "DelayedScaling"), ("tensorwise", "Float8CurrentScaling"), ("blockwise", "Float8BlockScaling")],
)
def test_recipes_of_run_yaml_are_recipes_of_transformer_engine(recipe: str, kind: str) -> None:
    from transformer_engine.common import recipe as recipes

    with _model(_run("tiny_llama", *FP8[recipe])) as model:
        found = get_fp8_recipe(model.config)
    assert isinstance(found, getattr(recipes, kind))
    assert found.fp8_format.name == "HYBRID"
    if recipe == "delayed":
        assert (found.amax_history_len, found.amax_compute_algo, found.margin) == (HISTORY, "max", 0)


@pytest.mark.parametrize(
    ("recipe", "modes"), [("bf16", ["NONE"]), ("tensorwise", ["FP8"]), ("ends in bf16", ["FP8", "NONE"])]
)
def test_user_buffers_are_requested_as_this_version_expects(
    recipe: str, modes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_engine.pytorch.module import base

    called = create_autospec(base.initialize_ub)  # refuses arguments that the function lacks
    monkeypatch.setattr(base, "initialize_ub", called)
    run = _run("tiny_llama", "parallel.tensor=2", "parallel.sequence=true", "speed.tp_comm_overlap=true", *FP8[recipe])
    initialize_user_buffers(run, {"tp_comm_overlap"})
    assert [mode.name for mode in called.call_args.kwargs["quantization_modes"]] == modes
