"""Round trip Hugging Face -> checkpoint -> Hugging Face, refused sources, and resuming a killed conversion."""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint.manifest import FileDigest, find_faults
from megatron_cpt.cli import main
from megatron_cpt.convert import importer
from megatron_cpt.convert.dtypes import DTYPES
from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.megatron.torch_dist_plan import Target, TensorSpec, plan_files
from megatron_cpt.convert.megatron.torch_dist_reader import TorchDistWeights
from megatron_cpt.convert.source import open_source_checkpoint
from megatron_cpt.convert.verify import verify_tensors
from megatron_cpt.errors import RefusedError, UserError
from tests.helpers.checkpoints import read_tensors
from tests.helpers.faults import change_manifest
from tests.helpers.hf_models import FAMILY_CONFIGS, save_hf_model


def quiet(_: int, __: int) -> None:
    """Ignore progress."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Create a tiny Hugging Face folder per family."""
    base = tmp_path_factory.mktemp("hf")
    return {family: save_hf_model(base / family, family, max_shard_size="60KB") for family in FAMILY_CONFIGS}


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors, read by the safetensors package."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_tensors(first: Path, second: Path) -> bool:
    a, b = hf_tensors(first), hf_tensors(second)
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def assert_same_config_in_both_forms(source: Path, exported: Path) -> None:
    """Compare a config.json of transformers 5, which has RoPE in the new form only, with its export."""
    before, after = (json.loads(file.read_text()) for file in (source, exported))
    rope = before.pop("rope_parameters")
    assert "rope_theta" not in before
    assert "rope_scaling" not in before
    assert before.pop("dtype") == after["torch_dtype"]
    assert {key: after.get(key) for key in before} == before
    assert after["rope_parameters"] == rope
    assert after["rope_theta"] == rope["rope_theta"]
    assert after.get("partial_rotary_factor") == rope.get("partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    assert after["rope_scaling"] == (None if scaling["rope_type"] == "default" else scaling)


def test_a_config_in_both_forms_is_copied_byte_for_byte(tmp_path: Path, folders: dict[str, Path]) -> None:
    source = folders["llama"]
    for number in range(2):
        import_checkpoint(source, tmp_path / f"c{number}")
        export_checkpoint(tmp_path / f"c{number}", tmp_path / f"hf{number}")
        source = tmp_path / f"hf{number}"
    assert filecmp.cmp(tmp_path / "hf0" / "config.json", tmp_path / "hf1" / "config.json", shallow=False)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize("target", [Target(), Target(2, 2, 50_000), Target(4, 1, 1)], ids=["1x1", "2x2", "4x1"])
def test_round_trip_of_every_family(tmp_path: Path, folders: dict[str, Path], family: str, target: Target) -> None:
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    report = import_checkpoint(folders[family], checkpoint, ImportOptions(target=target))
    assert report.family == family
    assert not find_faults(checkpoint)
    assert "hf/config.json" in json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert verify_tensors(folders[family], checkpoint, advance=quiet).is_equal
    export_checkpoint(checkpoint, back, ExportOptions(shard_bytes=40_000), advance=quiet)
    assert same_tensors(folders[family], back)
    assert_same_config_in_both_forms(folders[family] / "config.json", back / "config.json")
    assert len(list(back.glob("*.safetensors"))) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "checkpoint"]  # no work folder and no lock


def test_what_torch_reads_is_what_was_written(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Read pieces that were cut for TP 2 x PP 2 with torch's reader."""
    import_checkpoint(folders["llama"], tmp_path / "c", ImportOptions(target=Target(2, 2, 50_000)))
    theirs, hf = read_tensors(tmp_path / "c"), hf_tensors(folders["llama"])
    layer = "model.layers.1.mlp."
    gate_up = torch.cat([hf[f"{layer}gate_proj.weight"], hf[f"{layer}up_proj.weight"]])
    assert torch.equal(theirs["decoder.layers.mlp.linear_fc1.weight"][1], gate_up)
    assert torch.equal(theirs["decoder.layers.mlp.linear_fc2.weight"][1], hf[f"{layer}down_proj.weight"])
    norm = theirs["decoder.layers.self_attention.linear_qkv.layer_norm_weight"][1]
    assert torch.equal(norm, hf["model.layers.1.input_layernorm.weight"])
    embedding = theirs["embedding.word_embeddings.weight"]
    assert embedding.shape == (128, 48)
    assert torch.equal(embedding[:101], hf["model.embed_tokens.weight"])
    assert not embedding[101:].any()


def test_pieces_are_cut_where_the_ranks_are() -> None:
    specs = {f"decoder.layers.{n}.mlp.linear_fc2.weight": TensorSpec((8, 64), torch.float32) for n in range(8)}
    files = plan_files(specs, 8, Target(pipeline=4, shard_bytes=1 << 20))
    assert [file.name for file in files] == [f"__{stage}_0.distcp" for stage in range(4)]
    assert files[1].tensors == ("decoder.layers.2.mlp.linear_fc2.weight", "decoder.layers.3.mlp.linear_fc2.weight")
    small = plan_files(specs, 8, Target(pipeline=1, shard_bytes=8 * 64 * 4 * 3))
    assert [len(file.tensors) for file in small] == [3, 3, 2]


def test_paths_may_be_strings(tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import_checkpoint(str(folders["llama"]), "base")
    export_checkpoint("base", "back")
    assert verify_tensors("back", "base").is_equal
    with pytest.raises(UserError, match="dtype 'bfloat16' is not known; choose fp32, bf16, fp16"):
        import_checkpoint(str(folders["llama"]), "other", ImportOptions(dtype="bfloat16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "base"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_import_casts_to_each_dtype(tmp_path: Path, folders: dict[str, Path], dtype: str) -> None:
    import_checkpoint(folders["qwen2"], tmp_path / "c", ImportOptions(dtype=dtype))
    wanted = DTYPES[dtype]
    source = hf_tensors(folders["qwen2"])
    export_checkpoint(tmp_path / "c", tmp_path / "back", advance=quiet)
    for name, tensor in hf_tensors(tmp_path / "back").items():
        assert torch.equal(tensor, source[name].to(wanted)), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    assert config.get("dtype", config.get("torch_dtype")) == expected
    assert verify_tensors(folders["qwen2"], tmp_path / "c", advance=quiet).is_equal
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == wanted


def change(folder: Path, out: Path, name: str, edit: Any) -> Path:
    """Return a copy of a folder with one tensor changed, in one file."""
    tensors = hf_tensors(folder)
    tensors[name] = edit(tensors[name])
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, folders: dict[str, Path], value: float) -> None:
    bad = change(folders["llama"], tmp_path / "bad", NORM, lambda t: t.index_fill(0, torch.tensor([3]), value))
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.input_layernorm\.weight in .*not finite"):
        import_checkpoint(bad, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    import_checkpoint(bad, tmp_path / "c", ImportOptions(allow_nan=True))
    assert verify_tensors(bad, tmp_path / "c", advance=quiet).is_equal


def test_too_large_for_fp16(tmp_path: Path, folders: dict[str, Path]) -> None:
    large = change(folders["llama"], tmp_path / "large", NORM, lambda t: t + 1e6)
    with pytest.raises(RefusedError, match=r"too large for torch\.float16"):
        import_checkpoint(large, tmp_path / "c", ImportOptions(dtype="fp16"))


def test_verify_finds_one_differing_bit(tmp_path: Path, folders: dict[str, Path]) -> None:
    import_checkpoint(folders["llama"], tmp_path / "c")
    flipped = change(folders["llama"], tmp_path / "f", NORM, lambda t: (t.view(torch.int32) ^ 1).view(torch.float32))
    assert verify_tensors(flipped, tmp_path / "c", advance=quiet).differing == {NORM: 48}
    assert main(["convert", "verify", str(flipped), str(tmp_path / "c")]) == 3
    assert main(["convert", "verify", str(folders["llama"]), str(tmp_path / "c")]) == 0
    with pytest.raises(RefusedError, match="tied_embeddings"):
        verify_tensors(folders["qwen2"], tmp_path / "c", advance=quiet)


def test_a_tied_model_with_another_output_layer(tmp_path: Path, folders: dict[str, Path]) -> None:
    name = "lm_head.weight"
    tensors = hf_tensors(folders["qwen2"])
    same = tmp_path / "same"
    same.mkdir()
    shutil.copy(folders["qwen2"] / "config.json", same)
    save_file({**tensors, name: tensors["model.embed_tokens.weight"].clone()}, same / "model.safetensors")
    import_checkpoint(same, tmp_path / "c")
    other = change(same, tmp_path / "other", name, lambda t: t + 1)
    with pytest.raises(RefusedError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        import_checkpoint(other, tmp_path / "c2")


def test_side_files_that_are_links_out_of_the_folder_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "hf")
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(RefusedError, match=r"tokenizer\.json: a link that leads out"):
        import_checkpoint(folder, tmp_path / "c")
    (folder / "tokenizer.json").unlink()
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    import_checkpoint(folder, tmp_path / "c")
    assert sorted(p.name for p in (tmp_path / "c" / "hf").iterdir()) == ["config.json", "generation_config.json"]
    change_manifest(tmp_path / "c", lambda files: files.update({"../secret": FileDigest(2, "0")}))
    assert find_faults(tmp_path / "c") == ["../secret: not a file of this folder"]


def test_existing_targets_and_full_disks_are_refused(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        import_checkpoint(folders["llama"], tmp_path / "c")
    with pytest.raises(UserError, match="no such folder"):
        import_checkpoint(tmp_path / "nothing", tmp_path / "d")
    for convert in (import_checkpoint, export_checkpoint):
        with pytest.raises(UserError, match=r"out: is inside .*llama, which is an input"):
            convert(folders["llama"], folders["llama"] / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"GB are needed, 0\.0 GB are free"):
        import_checkpoint(folders["llama"], tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_export_refuses_a_corrupt_checkpoint(tmp_path: Path, folders: dict[str, Path]) -> None:
    import_checkpoint(folders["llama"], tmp_path / "c")
    file = tmp_path / "c" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(RefusedError, match=r"__0_0\.distcp: checksum differs"):
        export_checkpoint(tmp_path / "c", tmp_path / "back", advance=quiet)
    assert not (tmp_path / "back").exists()


# ------------------------------------------------------------------------------------------ killed


def _import_until_killed(source: str, target: str, num_files: int) -> None:
    real, written = importer.write_file, []

    def write(*args: Any, **kwargs: Any) -> Any:
        if len(written) == num_files:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(real(*args, **kwargs))
        return written[-1]

    importer.write_file = write  # type: ignore[assignment]
    import_checkpoint(Path(source), Path(target), ImportOptions(target=Target(shard_bytes=1), workers=1))


def test_a_killed_import_is_resumed(tmp_path: Path, folders: dict[str, Path]) -> None:
    options = ImportOptions(target=Target(shard_bytes=1))
    import_checkpoint(folders["llama"], tmp_path / "whole", options)
    process = multiprocessing.get_context("fork").Process(
        target=_import_until_killed, args=(str(folders["llama"]), str(tmp_path / "c"), 5)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "c").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".c.tmp").glob("*.distcp")}
    report = import_checkpoint(folders["llama"], tmp_path / "c", options)
    assert report.num_kept == 5
    again = {name for name, time in kept.items() if (tmp_path / "c" / name).stat().st_mtime_ns == time}
    assert len(again) == 5
    assert not find_faults(tmp_path / "c")
    assert _same_weights(tmp_path / "whole", tmp_path / "c")
    assert not (tmp_path / "c" / "journal.jsonl").exists()


def _same_weights(first: Path, second: Path) -> bool:
    a, b = TorchDistWeights(first), TorchDistWeights(second)
    return set(a.tensors) == set(b.tensors) and all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)


def test_another_source_restarts_from_scratch(tmp_path: Path, folders: dict[str, Path]) -> None:
    options = ImportOptions(target=Target(shard_bytes=1))
    process = multiprocessing.get_context("fork").Process(
        target=_import_until_killed, args=(str(folders["llama"]), str(tmp_path / "c"), 5)
    )
    process.start()
    process.join(60)
    other = change(folders["llama"], tmp_path / "other", NORM, lambda t: t + 1)
    assert import_checkpoint(other, tmp_path / "c", options).num_kept == 0
    assert verify_tensors(other, tmp_path / "c", advance=quiet).is_equal


# ------------------------------------------------------------------------------------------ vocabulary


@pytest.fixture(scope="module")
def with_tokenizer(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the tiny Llama with a tokenizer for its 101 ids: single letters and marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(folders["llama"], tmp_path_factory.mktemp("hf") / "llama")
    vocabulary = {chr(33 + n): n for n in range(94)} | {f"<{n}>": 94 + n for n in range(7)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<0>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rows", ["pieces", "mean"])
def test_new_tokens(tmp_path: Path, with_tokenizer: Path, rows: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokens.txt").write_bytes("abc\r\nA\n<to\u2028ol>\nabc\n".encode())
    arguments = ["--add-tokens", str(tmp_path / "tokens.txt"), "--init-rows", rows]
    assert main(["convert", "import", str(with_tokenizer), str(tmp_path / "c"), *arguments]) == 0
    assert "tokens.txt: 1 lines repeat earlier ones" in caplog.text
    state = orjson.loads((tmp_path / "c" / "state.json").read_bytes())
    assert state["imported"]["vocabulary"]["num_new"] == 2
    assert state["imported"]["vocabulary"]["known"] == ["A"]
    opened = open_source_checkpoint(tmp_path / "c")
    assert (opened.model.vocab, opened.model.padded_vocab) == (103, 128)
    old, new = hf_tensors(with_tokenizer), opened.read("embedding.word_embeddings.weight", 0, 128)
    table = old["model.embed_tokens.weight"]
    assert torch.equal(new[:101], table)
    abc = table[[ord(letter) - 33 for letter in "abc"]].mean(dim=0) if rows == "pieces" else table.mean(dim=0)
    assert torch.allclose(new[101], abc, atol=1e-6)
    assert not new[103:].any()
    head = opened.read("output_layer.weight", 101, 102)[0]
    assert torch.allclose(head, old["lm_head.weight"].mean(dim=0), atol=1e-6) == (rows == "mean")
    export_checkpoint(tmp_path / "c", tmp_path / "back", advance=quiet)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("abc").input_ids == [101]
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 103
    assert hf_tensors(tmp_path / "back")["lm_head.weight"].shape == (103, 48)


def test_ids_that_only_the_tokenizer_has_are_warned_about_and_become_rows(
    tmp_path: Path, with_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    folder = shutil.copytree(with_tokenizer, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])  # ids 101 to 103; the model has 101 rows
    tokenizer.save_pretrained(folder)
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")  # so that a rewritten file differs
    assert main(["convert", "import", str(folder), str(tmp_path / "c")]) == 0
    assert "the tokenizer has 3 ids more than the model has rows" in capsys.readouterr().out
    (tmp_path / "known.txt").write_text("<a>\n<b>\n<c>\n")
    (tmp_path / "more.txt").write_text("abc\nA\n")
    mean = hf_tensors(folder)["model.embed_tokens.weight"].mean(dim=0)
    for tokens, after in (("known", 104), ("more", 105)):
        arguments = ["--add-tokens", str(tmp_path / f"{tokens}.txt")]
        assert main(["convert", "import", str(folder), str(tmp_path / tokens), *arguments]) == 0
        printed = capsys.readouterr().out
        assert f"101 -> {after}: {after - 101} new" in printed
        assert "more than the model has rows" not in printed
        opened = open_source_checkpoint(tmp_path / tokens)
        assert opened.model.vocab == after
        rows = opened.read("embedding.word_embeddings.weight", 101, 128)
        assert torch.allclose(rows[:3], mean.expand(3, -1), atol=1e-6)
        assert rows[3].any() == (after == 105), "abc, from its pieces"
        assert not rows[after - 101 :].any()
        is_unchanged = opened.side_files["tokenizer.json"].read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert is_unchanged == (tokens == "known"), "data made with the tokenizer stays usable"
    with pytest.raises(UserError, match="already have all of them"):
        import_checkpoint(tmp_path / "known", tmp_path / "again", ImportOptions(new_tokens=("<a>",)))


def test_new_tokens_beside_gaps_of_the_vocabulary(tmp_path: Path, with_tokenizer: Path) -> None:
    """A tokenizer counts its tokens to find the next id, so it may give an id twice."""
    folder = shutil.copytree(with_tokenizer, tmp_path / "hf")
    data = json.loads((folder / "tokenizer.json").read_text())
    entries = data["model"]["vocab"]
    data["added_tokens"] = []
    data["model"]["vocab"] = {token: number for token, number in entries.items() if number < 90 or number == 95}
    data["model"]["unk_token"] = "!"
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "!"}')
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(RefusedError, match=r"ids that others have already: 95 \('<1>'\).* ids from 96 on"):
        import_checkpoint(folder, tmp_path / "taken", ImportOptions(new_tokens=("ab", "bc", "cd", "de", "ef")))
    data["model"]["vocab"]["beyond"] = 103
    (folder / "tokenizer.json").write_text(json.dumps(data))
    report = import_checkpoint(folder, tmp_path / "c", ImportOptions(new_tokens=("ab", "ab")))
    assert report.vocabulary is not None
    assert (report.vocabulary.num_new, report.vocabulary.from_pieces) == (4, 1)  # ids 92, and 101 to 103
    rows = open_source_checkpoint(tmp_path / "c").read("embedding.word_embeddings.weight", 0, 104)
    old = hf_tensors(folder)["model.embed_tokens.weight"]
    assert [n for n in range(101) if not torch.equal(rows[n], old[n])] == [92]


def test_new_tokens_for_a_model_in_the_hub_cache(tmp_path: Path, with_tokenizer: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", shutil.copytree(with_tokenizer, tmp_path / "blobs")
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(file.rename(blobs / str(number)))
    report = import_checkpoint(snapshot, tmp_path / "c", ImportOptions(new_tokens=("abc",)))
    assert report.vocabulary is not None
    assert (report.vocabulary.num_new, report.vocabulary.after) == (1, 102)


def test_new_tokens_without_a_tokenizer(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no tokenizer files"):
        import_checkpoint(folders["llama"], tmp_path / "c", ImportOptions(new_tokens=("x",)))


# ------------------------------------------------------------------------------------------ commands


def test_commands(tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    c, back = str(tmp_path / "c"), str(tmp_path / "back")
    assert main(["convert", "import", str(folders["nemotron"]), c, "--tensor", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "nemotron"
    assert main(["convert", "export", c, back, "--shard-size", "50KB"]) == 0
    assert "nemotron, 24 tensors" in capsys.readouterr().out
    assert same_tensors(folders["nemotron"], Path(back))
    assert main(["convert", "verify", back, c, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["equal"]
    assert main(["convert", "import", str(folders["nemotron"]), c]) == 2
    assert main(["convert", "export", c, back + "2", "--shard-size", "many"]) == 2
    assert main(["convert", "export", c, back + "2", "--family", "llama"]) == 3
    (folders["nemotron"].parent / "empty").mkdir()
    assert main(["convert", "import", str(folders["nemotron"].parent / "empty"), back + "3"]) == 3
    assert not Path(back + "2").exists()


def test_megatron_lms_own_arguments(tmp_path: Path, folders: dict[str, Path]) -> None:
    from tools.convert_checkpoint import main as tool

    ours, back = tmp_path / "c", tmp_path / "back"
    there = ["--model-type", "GPT", "--loader", "llama_mistral", "--saver", "core"]
    sizes = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    assert tool([*there, "--load-dir", str(folders["llama"]), "--save-dir", str(ours), *sizes]) == 0
    back_again = ["--model-type", "GPT", "--loader", "core", "--saver", "llama_mistral"]
    assert tool([*back_again, "--load-dir", str(ours), "--save-dir", str(back)]) == 0
    assert same_tensors(folders["llama"], back)
    assert tool(["--model-type", "BERT", "--load-dir", str(ours), "--save-dir", str(back)]) == 2
