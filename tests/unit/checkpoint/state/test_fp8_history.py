"""Scaling factors of Transformer Engine as tensors: stored once and restored; its pickles are neither kept nor read.

Stand-ins replace its layers; they have the attributes of `TransformerEngineBaseModule` (pytorch/module/base.py, 2.x)
that `fp8_history` uses.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_cpt.backend import cpu
from megatron_cpt.backend.distributed import process_groups
from megatron_cpt.config import draft_config
from tests.unit.model.test_capabilities import RUN

cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear  # noqa: E402

from megatron_cpt.checkpoint.loading import load  # noqa: E402
from megatron_cpt.checkpoint.record import SavedRun  # noqa: E402
from megatron_cpt.checkpoint.state import fp8_history, state_dicts  # noqa: E402
from megatron_cpt.model import spec  # noqa: E402
from megatron_cpt.model.build_model import Model, build_model  # noqa: E402

HISTORY = 4
KEYS = [f"decoder.layers.mlp.linear_fc1.fp8_{way}.amax_history" for way in ("forward", "backward")]


class StandIn(ColumnParallelLinear):  # type: ignore[misc]
    """Linear layer with the state of delayed scaling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": True}

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        assert self.fp8_meta["recipe"] is recipe
        for key, num_tensors in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            num_tensors *= self.fp8_meta["num_gemms"]
            history, scale = torch.zeros(HISTORY, num_tensors), torch.ones(num_tensors)
            self.fp8_meta[key] = SimpleNamespace(amax_history=history, scale=scale)

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps({"recipe": "delayed"})), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        assert state is None, "Transformer Engine would unpickle this"  # None: nothing was loaded


@contextlib.contextmanager
def _models(monkeypatch: pytest.MonkeyPatch, recipe: str = "delayed") -> Iterator[tuple[Model, Model]]:
    """Yield two models of four layers before their first forward pass."""
    local_layer = spec._local_layer

    def layer(**options: Any) -> Any:
        made = local_layer(**options)
        mlp = made.submodules.mlp
        linears = mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules
        linears.linear_fc1 = StandIn
        return made

    monkeypatch.setattr(spec, "_local_layer", layer)
    monkeypatch.setattr(fp8_history, "get_fp8_recipe", lambda config: "the recipe")
    run = draft_config(dict(RUN)).finish("run.yaml")
    with process_groups(run.parallel):
        models = build_model(run), build_model(run)
        for model in models:
            model.config.fp8, model.config.fp8_recipe = "hybrid", recipe
        yield models


def _layers(model: Model) -> list[StandIn]:
    return [module for module in model.chunks[0].modules() if isinstance(module, StandIn)]


def _compute(model: Model) -> None:
    """Fill the state as forward and backward passes do, with different numbers in every layer."""
    for number, layer in enumerate(_layers(model)):
        layer.fp8_meta.update(recipe="the recipe", num_gemms=1)
        layer.init_fp8_meta_tensors("the recipe")
        for way, key in enumerate(("scaling_fwd", "scaling_bwd")):
            layer.fp8_meta[key].scale += number + 10 * way
            layer.fp8_meta[key].amax_history += 0.1 * torch.arange(HISTORY)[:, None] + number


def _save(model: Model, folder: Path) -> None:
    folder.mkdir()
    dist_checkpointing.save(state_dicts.model_state(model.chunks), str(folder))


def _saved_run(folder: Path) -> SavedRun:
    return SavedRun(folder, manifest={}, state={}, run={})


def _entries(folder: Path) -> dict[str, Any]:
    return FileSystemReader(folder).read_metadata().state_dict_metadata


def test_histories_come_back(tmp_path, monkeypatch):
    with _models(monkeypatch) as (model, fresh):
        _compute(model)
        _save(model, tmp_path / "saved")
        stored = _entries(tmp_path / "saved")
        # by layer; a row of scales above the history
        assert [tuple(stored[key].size) for key in KEYS] == [(4, HISTORY + 1, 3), (4, HISTORY + 1, 2)]
        assert "scaling_fwd" not in _layers(fresh)[0].fp8_meta
        load.load_weights(_saved_run(tmp_path / "saved"), fresh.chunks, "none")
        for old, new in zip(_layers(model), _layers(fresh), strict=True):
            for key in ("scaling_fwd", "scaling_bwd"):
                assert torch.equal(new.fp8_meta[key].scale, old.fp8_meta[key].scale)
                assert torch.equal(new.fp8_meta[key].amax_history, old.fp8_meta[key].amax_history)
        assert torch.equal(_layers(fresh)[3].fp8_meta["scaling_bwd"].scale, torch.full((2,), 14.0))


def test_its_pickles_are_written_empty(monkeypatch):
    with _models(monkeypatch) as (model, _):
        _compute(model)
        state = state_dicts.model_state(model.chunks)["model0"]
        extra = [entry.data for name, entry in state.items() if name.endswith("linear_fc1._extra_state")]
        assert len(extra) == 4
        assert all(data.numel() == 0 and data.dtype == torch.uint8 for data in extra)
        wanted = state_dicts.model_state(model.chunks, is_loading=True)["model0"]
        assert not [name for name in wanted if name.endswith("linear_fc1._extra_state")]
        assert [name for name in wanted if name.endswith("linear_proj._extra_state")]  # megatron-core's own, empty


def test_a_run_that_takes_up_fp8_starts_new_histories(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    with _models(monkeypatch) as (model, fresh):
        _save(model, tmp_path / "bf16")  # no forward pass in FP8 yet
        assert KEYS[0] not in _entries(tmp_path / "bf16")
        load.load_weights(_saved_run(tmp_path / "bf16"), fresh.chunks, "none")
        assert torch.equal(_layers(fresh)[0].fp8_meta["scaling_fwd"].scale, torch.ones(3))
    assert "FP8 scaling starts from scratch" in caplog.text


def test_other_recipes_have_no_histories(tmp_path, monkeypatch):
    with _models(monkeypatch, recipe="tensorwise") as (model, fresh):
        _compute(model)
        _save(model, tmp_path / "delayed")
        load.load_weights(_saved_run(tmp_path / "delayed"), fresh.chunks, "none")
        assert "scaling_fwd" not in _layers(fresh)[0].fp8_meta
