"""Export for Megatron-LM: arguments of the model, folders, refusals; loads are in tests/distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_cpt.checkpoint.manifest import CorruptCheckpointError
from megatron_cpt.cli.commands.checkpoints.convert_command import app
from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.convert.megatron import megatron_lm_export
from megatron_cpt.convert.megatron.config import model_fields
from megatron_cpt.convert.megatron.megatron_lm_export import export_megatron_lm, model_arguments
from megatron_cpt.convert.megatron.torch_dist_reader import TorchDistWeights
from megatron_cpt.convert.source import open_source_checkpoint
from megatron_cpt.errors import CptError, RefusedError, UserError
from tests.helpers.hf_models import save_hf_model
from tests.unit.convert.megatron.test_convert_megatron import LLAMA, save_torch_dist, stacked, weights

LINEAR = {"type": "linear", "factor": 4.0}
GPT = {"activation": "gelu", "gated": False, "norm": "layernorm", "linear_bias": True}
NEMOTRON = {"activation": "squared_relu", "gated": False, "norm": "layernorm1p", "rotary_percent": 0.5}


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A checkpoint of ours with weights only."""
    import_checkpoint(save_hf_model(tmp_path / "hf", "nemotron", num_hidden_layers=2), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GPT,
        NEMOTRON,
        {"kv_groups": None, "qk_norm": True, "qkv_bias": True},
        {"rope_scaling": {}, "rotary_base": 5e5},
        {"rope_scaling": LINEAR, "max_positions": 64},
        {"tied_embeddings": True, "vocab": 100},
    ],
)
def test_arguments_describe_the_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = ModelConfig.model_validate({**LLAMA.model_dump(mode="json"), **changes})
    reader = TorchDistWeights(save_torch_dist(tmp_path, stacked(weights(model))))
    assert set(reader.tensors) == set(expected_tensors(model))
    found = ModelConfig.model_validate(model_fields(model_arguments(model), reader, "here"))
    assert found == model.model_copy(update={"kv_groups": model.num_kv_groups})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gated": False}, "silu, not gated: Megatron-LM has no argument"),
        ({"activation": "gelu"}, "gelu, gated"),
        ({"rope_scaling": {"low_freq_factor": 2.0}}, "low_freq_factor 1"),
    ],
)
def test_models_without_an_argument_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RefusedError, match=match):
        model_arguments(ModelConfig.model_validate({**LLAMA.model_dump(mode="json"), **changes}))


def test_weights_alone_become_a_release(imported: Path, tmp_path: Path) -> None:
    report = export_megatron_lm(imported, tmp_path / "out")
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release\n"
    assert report.iteration == 0
    source, found = open_source_checkpoint(imported), open_source_checkpoint(tmp_path / "out")
    assert found.specs == source.specs
    assert all(
        found.read(name, 0, spec.shape[0]).equal(source.read(name, 0, spec.shape[0]))
        for name, spec in source.specs.items()
    )
    arguments = TorchDistWeights(tmp_path / "out").common()["args"].state
    assert (arguments["no_save_optim"], arguments["no_save_rng"], arguments["num_layers"]) == (True, True, 2)
    with pytest.raises(UserError, match="exists already"):
        export_megatron_lm(imported, tmp_path / "out")
    with pytest.raises(UserError, match=r"out: is inside .*, which is an input"):
        export_megatron_lm(imported, imported / "out")


def test_a_damaged_checkpoint_is_not_exported(imported: Path, tmp_path: Path) -> None:
    shard = imported / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp"):
        export_megatron_lm(imported, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name and path.is_dir()] == []
    with pytest.raises(UserError, match="no such checkpoint"):
        export_megatron_lm(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(RefusedError, match="holds no checkpoint"):
        export_megatron_lm(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("name", ["common.pt", "state.json"])
def test_damage_beside_the_tensors_is_found(imported: Path, tmp_path: Path, name: str) -> None:
    with open(imported / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(RefusedError, match=name):
        export_megatron_lm(imported, tmp_path / "out")


def test_an_interrupted_export_is_resumed(imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call ends after it has extended `.metadata`; the second one copies only that file again."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(megatron_lm_export, "write_common", fail)
        with pytest.raises(CptError, match="No space left"):
            export_megatron_lm(imported, tmp_path / "out")
    copied: list[str] = []
    copy = megatron_lm_export.copy_file
    monkeypatch.setattr(
        megatron_lm_export, "copy_file", lambda source, target: (copied.append(source.name), copy(source, target))
    )
    export_megatron_lm(imported, tmp_path / "out")
    assert copied == [".metadata"]
    assert open_source_checkpoint(tmp_path / "out").specs == open_source_checkpoint(imported).specs


def test_the_command_prints_what_megatron_lm_needs(imported: Path, tmp_path: Path) -> None:
    command = ["export", str(imported), str(tmp_path / "out"), "--format", "megatron"]
    result = CliRunner().invoke(app, [*command, "--dtype", "bf16"])
    assert isinstance(result.exception, UserError)
    assert "--dtype: of no use with --format megatron" in str(result.exception)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"--load {tmp_path}/out --use-checkpoint-args" in result.output


def test_hugging_face_has_no_optimizer(tmp_path: Path) -> None:
    hf = save_hf_model(tmp_path / "hf", "nemotron", num_hidden_layers=2)
    with pytest.raises(UserError, match="only torch_dist checkpoints are read with their optimizer"):
        import_checkpoint(hf, tmp_path / "checkpoint", ImportOptions(optimizer=True))
