"""Conversions never publish corrupt data, overwrite foreign files or change a model silently."""

from __future__ import annotations

import argparse
import fcntl
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint.torchfile.torch_file import open_torch_file
from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
from megatron_cpt.convert.huggingface.writer import HfWriter
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.megatron.config import model_fields
from megatron_cpt.convert.megatron.torch_dist_plan import TensorSpec
from megatron_cpt.convert.megatron.torch_dist_reader import TorchDistWeights
from megatron_cpt.convert.source import open_source_checkpoint
from megatron_cpt.errors import RefusedError, UserError
from tests.helpers.hf_models import save_hf_model
from tests.unit.convert.megatron.test_convert_megatron import ARGUMENTS, LLAMA, save_torch_dist, stacked, weights


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_model(tmp_path_factory.mktemp("hf") / "llama", "llama")


@pytest.fixture(scope="module")
def checkpoint(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "step-00000000"
    import_checkpoint(hf, path)
    return path


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# ---------------------------------------------------------------------------------------- a checkpoint as the source


def test_damage_is_not_published_under_new_checksums(tmp_path: Path, checkpoint: Path) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    flip_a_bit(broken / "__0_0.distcp")
    with pytest.raises(RefusedError, match=r"__0_0\.distcp: checksum differs"):
        import_checkpoint(broken, tmp_path / "c")
    (broken / "manifest.json").unlink()
    for action in (import_checkpoint, export_checkpoint):
        with pytest.raises(RefusedError, match=r"manifest\.json: missing"):
            action(broken, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_run_directory_means_its_newest_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / checkpoint.name)
    assert import_checkpoint(tmp_path / "run", tmp_path / "c", ImportOptions(dtype="bf16")).kind == "torch_dist"
    assert open_source_checkpoint(tmp_path / "c").specs["output_layer.weight"].dtype is torch.bfloat16


def test_export_does_not_make_weights_infinite(tmp_path: Path, hf: Path) -> None:
    folder = shutil.copytree(hf, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1e6}, folder / "model.safetensors")
    import_checkpoint(folder, tmp_path / "c")
    with pytest.raises(RefusedError, match=r"model\.norm\.weight: holds weights up to 1e\+06, too large for .*float16"):
        export_checkpoint(tmp_path / "c", tmp_path / "back", ExportOptions(dtype="fp16"))
    assert not (tmp_path / "back").exists()


def test_a_weight_that_is_not_finite_is_named_with_its_file(tmp_path: Path, hf: Path) -> None:
    folder = shutil.copytree(hf, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RefusedError, match=r"layers\.1\.self_attn\.k_proj\.weight in .*model\.safetensors.*not finite"):
        import_checkpoint(folder, tmp_path / "c")


def test_config_json_says_what_the_model_is_now(tmp_path: Path, checkpoint: Path) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "c")
    run = yaml.safe_load((path / "run.yaml").read_text())
    run["seq_length"], run["phases"] = 128, [{"name": "general"}, {"name": "long", "seq_length": 4096}]
    (path / "run.yaml").write_text(yaml.safe_dump(run))
    export_checkpoint(path, tmp_path / "longer", ExportOptions(verify="none"))
    config = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("llama", 4096)
    export_checkpoint(path, tmp_path / "other", ExportOptions(verify="none", family="mistral"))
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])


def test_a_missing_base_is_reported(tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "c")
    shutil.rmtree(path / "hf")
    run = yaml.safe_load((path / "run.yaml").read_text())
    (path / "run.yaml").write_text(yaml.safe_dump({**run, "init": {"from": str(tmp_path / "gone")}}))
    assert not open_source_checkpoint(path, verify="none").side_files
    assert "gone, which does not exist, so config and tokenizer files are unknown" in caplog.text


# ---------------------------------------------------------------------------------------- the folder beside the target


@pytest.mark.parametrize("kind", ["import", "export"])
def test_one_process_at_a_time(tmp_path: Path, hf: Path, checkpoint: Path, kind: str) -> None:
    convert, source = (import_checkpoint, hf) if kind == "import" else (export_checkpoint, checkpoint)
    with open(tmp_path / ".out.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is working on it"):
            convert(source, tmp_path / "out")
        assert [file.name for file in tmp_path.iterdir()] == [".out.lock"]
    convert(source, tmp_path / "out")  # the lock file of a killed process locks nothing
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_foreign_work_folder_is_not_touched(tmp_path: Path, hf: Path, checkpoint: Path, kind: str) -> None:
    convert, source = (import_checkpoint, hf) if kind == "import" else (export_checkpoint, checkpoint)
    theirs = tmp_path / (".out.tmp" if kind == "import" else "out.partial")
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="holds files of something else"):
        convert(source, tmp_path / "out")
    assert (theirs / "thesis.tex").read_text() == "all of it"


def test_a_writer_killed_while_it_laid_out_its_files_starts_over(tmp_path: Path) -> None:
    plan = {"w": ((2,), torch.float32)}
    writer = HfWriter(tmp_path / "model", plan)
    writer.close()
    journal, data = writer.folder / "journal.jsonl", writer.folder / "model.safetensors"
    journal.unlink()  # nothing is finished: the files have no final size yet
    data.write_bytes(b"")
    (writer.folder / "tokenizer.json").touch()
    writer = HfWriter(tmp_path / "model", plan)
    writer.write_rows("w", 0, torch.ones(2))
    writer.finish()
    assert load_file(tmp_path / "model" / "model.safetensors")["w"].tolist() == [1, 1]
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["model.safetensors"]


# ------------------------------------------------------------------ configs of Megatron, Bridge and NeMo


def test_bridge_config_inside_its_iteration(tmp_path: Path) -> None:
    folder = save_torch_dist(tmp_path / "iter_0000010", stacked(weights()))
    model = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 24, "num_attention_heads": 4, "kv_channels": 8}
    model |= {"num_query_groups": 2, "gated_linear_unit": True, "normalization": "RMSNorm", "seq_length": 131072}
    model |= {"activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False}, "add_bias_linear": False}
    model |= {"rope_scaling": True, "rope_scaling_factor": 32.0}
    (folder / "run_config.yaml").write_text(json.dumps({"model": model}))
    found = open_source_checkpoint(tmp_path).model
    assert found.model_copy(update={"rope_scaling": None, "max_positions": None}) == LLAMA
    assert found.max_positions == 131072
    assert found.rope_scaling is not None
    assert found.rope_scaling.factor == 32.0
    (folder / "run_config.yaml").write_text("{model: [")
    with pytest.raises(RefusedError, match=r"run_config\.yaml: 1 problem\n.*not valid YAML.*--model FILE\.yaml"):
        open_source_checkpoint(tmp_path)


def test_bridge_config_of_a_model_builder(tmp_path: Path) -> None:
    """Megatron-Bridge's model builders nest the fields of TransformerConfig in a section `transformer`."""
    folder = save_torch_dist(tmp_path / "iter_0000010", stacked(weights()))
    (folder / "modelopt_state").mkdir()
    transformer = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "kv_channels": 8,
    }
    transformer |= {"num_query_groups": 2, "gated_linear_unit": True, "normalization": "RMSNorm"}
    transformer |= {"activation_func": "silu", "add_bias_linear": False, "softmax_type": "vanilla", "use_mup": False}
    transformer |= {"_target_": "megatron.core.transformer.transformer_config.TransformerConfig"}
    model = {"_target_": "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig", "transformer": transformer}
    model |= {"position_embedding_type": "rope", "vocab_size": 128, "seq_length": 64, "rotary_base": 500000}
    (folder / "run_config.yaml").write_text(json.dumps({"model": model, "train": {"train_iters": 10}}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    found = open_source_checkpoint(tmp_path)
    assert found.model == LLAMA.model_copy(update={"max_positions": 64, "rotary_base": 500000})
    assert list(found.side_files) == ["tokenizer.json"]
    transformer["activation_func"] = "quick_gelu"
    (folder / "run_config.yaml").write_text(json.dumps({"model": model}))
    with pytest.raises(RefusedError, match="activation_func 'quick_gelu' is not known"):
        open_source_checkpoint(tmp_path)


def fields_of(**changes: Any) -> dict[str, Any]:
    tensors = {"embedding.word_embeddings.weight": TensorSpec((128, 32), torch.float32)}
    return model_fields({**ARGUMENTS, **changes}, SimpleNamespace(tensors=tensors), "here")  # type: ignore[arg-type]


def test_rope_scaling_of_nemo_2() -> None:
    scaling = fields_of(scale_factor=32, low_freq_factor=1, high_freq_factor=4, old_context_len=8192)["rope_scaling"]
    assert scaling == {
        "factor": 32,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_positions": 8192,
    }


@pytest.mark.parametrize("name", ["rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"])
def test_interpolated_positions_are_linear_scaling(name: str) -> None:
    assert fields_of(**{name: 4})["rope_scaling"] == {"type": "linear", "factor": 4}
    assert "rope_scaling" not in fields_of(**{name: 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": [4096, 0]}, r"sliding-window attention \(\[4096, 0\]\)"),
        ({"rotary_interleaved": True}, "rotary_interleaved: True"),
        ({"softmax_scale": 0.5}, "softmax_scale: 0.5"),
        ({"softmax_type": "off-by-one"}, "softmax_type: off-by-one"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset: 1.0"),
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value: 7.0"),
        ({"use_mup": True}, "use_mup: True"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ],
)
def test_arguments_that_change_the_computation_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        fields_of(**changes)


def test_arguments_without_effect_are_read() -> None:
    assert fields_of(window_size=[-1, -1], rotary_interleaved=False, softmax_scale=None) == fields_of()


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    tensors = weights()
    tensors["decoder.final_layernorm.weight"] = torch.ones(32, dtype=torch.int64)
    folder = save_torch_dist(tmp_path, stacked(tensors))
    torch.save({"args": argparse.Namespace(**ARGUMENTS)}, folder / "common.pt")
    with pytest.raises(RefusedError, match=r"decoder\.final_layernorm\.weight: torch\.int64"):
        open_source_checkpoint(tmp_path)


def test_optimizer_states_under_a_chain(tmp_path: Path) -> None:
    states = {f"chained_0.optimizer.state.exp_avg.{key}": tensor for key, tensor in stacked(weights()).items()}
    save_torch_dist(tmp_path, {**stacked(weights()), **states})
    assert set(TorchDistWeights(tmp_path).tensors) == set(weights())


# ---------------------------------------------------------------------------------------- hostile metadata


@pytest.mark.parametrize("field", ["relative_path", "offset", "length"])
def test_metadata_with_other_types_in_it(tmp_path: Path, field: str) -> None:
    save_torch_dist(tmp_path, stacked(weights()))
    with open(tmp_path / ".metadata", "rb") as file:
        metadata = pickle.load(file)  # noqa: S301 - this test's own
    for info in metadata.storage_data.values():
        object.__setattr__(info, field, [7])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RefusedError, match="damaged"):
        TorchDistWeights(tmp_path).read("output_layer.weight")


@pytest.mark.parametrize("of", ["tensor", "storage"])
def test_a_pickle_cannot_lead_a_tensor_to_another_file(tmp_path: Path, of: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"12345678")
    torch.save(torch.zeros(8, dtype=torch.uint8), tmp_path / "sound.pt")
    state = {"path": str(secret), "offset": 0} if of == "tensor" else {"offset": 0}
    build = pickle.dumps(state, protocol=2)[2:-1] + b"b"  # BUILD: give the object before it this state
    with zipfile.ZipFile(tmp_path / "sound.pt") as sound, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in sound.namelist():
            data = sound.read(name)
            if name.endswith("data.pkl"):
                data = data[:-1] + build + b"." if of == "tensor" else data.replace(b"Q", b"Q" + build, 1)
            bad.writestr(name, data)
    with pytest.raises(RefusedError, match="wants to change the place"):
        open_torch_file(tmp_path / "bad.pt")
