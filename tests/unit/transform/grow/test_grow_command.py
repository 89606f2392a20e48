"""`megatron-cpt grow` on disk: exports, dtypes, layouts, refusals and kills. The proof is in tests/distributed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_cpt.checkpoint.manifest import find_faults
from megatron_cpt.cli import main
from megatron_cpt.convert import importer
from megatron_cpt.convert.exporter import export_checkpoint
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.megatron.torch_dist_plan import Target
from megatron_cpt.transform.grow.grow_checkpoint import GrowOptions, grow_checkpoint
from tests.helpers.checkpoints import differing, read_tensors
from tests.helpers.growth import relative_difference
from tests.helpers.hf_models import save_hf_model

WIDE_AND_DEEP = {"hidden": 96, "ffn_hidden": 144, "heads": 8, "layers": 4}
NO_PROOF = GrowOptions(should_prove=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create `hf` (tied Qwen3, two layers), its import `small`, and `model.yaml` with twice its width and depth."""
    folder = tmp_path_factory.mktemp("grow")
    save_hf_model(folder / "hf", "qwen3")
    import_checkpoint(folder / "hf", folder / "small", ImportOptions(target=Target(2, 2, 20_000)))
    (folder / "model.yaml").write_text(yaml.safe_dump(WIDE_AND_DEEP))
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def test_the_export_of_a_grown_model_has_the_logits_of_the_small_one(base: Path, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    assert (
        main(["grow", str(base / "small"), "--to", str(base / "model.yaml"), "--output", str(grown), "--no-proof"]) == 0
    )
    assert not find_faults(grown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown"]
    export_checkpoint(grown, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 4
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]) == (96, 4, 4)
    assert relative_difference(load(base / "hf"), load(tmp_path / "hf")) < 1e-5


def test_the_manifest_names_the_origin(base: Path, tmp_path: Path) -> None:
    report = grow_checkpoint(base / "small", base / "model.yaml", tmp_path / "grown", NO_PROOF)
    state = json.loads((tmp_path / "grown" / "state.json").read_text())
    assert state["content"] == "weights"
    provenance = json.loads((tmp_path / "grown" / "manifest.json").read_text())["provenance"]
    assert provenance["command"] == "grow"
    assert provenance["inputs"][0]["path"] == str(base / "small")
    assert provenance["sizes"]["layers"] == [2, 4]
    assert provenance["identity_layers"] == {"1": 0, "3": 1}
    assert (provenance["noise"], provenance["seed"]) == (0.316, 1234)
    assert report.proof is None
    assert "proof" not in provenance


def test_layouts_of_source_and_target_do_not_matter(base: Path, tmp_path: Path) -> None:
    import_checkpoint(base / "hf", tmp_path / "one")
    target = GrowOptions(should_prove=False, target=Target(4, 2, 50_000), workers=3)
    grow_checkpoint(base / "small", base / "model.yaml", tmp_path / "a", target)
    grow_checkpoint(tmp_path / "one", base / "model.yaml", tmp_path / "b", NO_PROOF)
    assert differing(tmp_path / "a", tmp_path / "b") == []


def test_seed_and_noise(base: Path, tmp_path: Path) -> None:
    for name, options in {
        "seed": GrowOptions(seed=1, should_prove=False),
        "none": GrowOptions(noise=0, should_prove=False),
    }.items():
        grow_checkpoint(base / "small", base / "model.yaml", tmp_path / name, options)
    grow_checkpoint(base / "small", base / "model.yaml", tmp_path / "default", NO_PROOF)
    assert "embedding.word_embeddings.weight" not in differing(tmp_path / "default", tmp_path / "seed")
    assert "decoder.layers.mlp.linear_fc1.weight" in differing(tmp_path / "default", tmp_path / "seed")
    tensors = read_tensors(tmp_path / "none")
    proj = tensors["decoder.layers.self_attention.linear_proj.weight"]
    assert torch.equal(proj[0, :48], proj[0, 48:])
    assert not proj[1].any()  # an identity layer


def test_bf16_is_rounded_once(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    import_checkpoint(tmp_path / "hf", tmp_path / "small")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(WIDE_AND_DEEP))
    grow_checkpoint(tmp_path / "small", tmp_path / "model.yaml", tmp_path / "bf16", NO_PROOF)
    exact = GrowOptions(dtype="fp32", should_prove=False)
    grow_checkpoint(tmp_path / "small", tmp_path / "model.yaml", tmp_path / "fp32", exact)
    rounded, whole = read_tensors(tmp_path / "bf16"), read_tensors(tmp_path / "fp32")
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in rounded.items())
    export_checkpoint(tmp_path / "fp32", tmp_path / "out32")
    export_checkpoint(tmp_path / "bf16", tmp_path / "out16")
    small = load(tmp_path / "hf")
    assert relative_difference(small, load(tmp_path / "out32")) < 1e-5
    assert 1e-4 < relative_difference(small, load(tmp_path / "out16")) < 0.1


def _grow_until_killed(base: str, target: str, num_files: int) -> None:
    real, written = importer.write_file, []

    def write(*args: Any, **kwargs: Any) -> Any:
        if len(written) == num_files:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(real(*args, **kwargs))
        return written[-1]

    importer.write_file = write  # type: ignore[assignment]
    options = GrowOptions(should_prove=False, target=Target(shard_bytes=1), workers=1)
    grow_checkpoint(Path(base) / "small", Path(base) / "model.yaml", Path(target), options)


@pytest.mark.parametrize("num_files", [pytest.param(0, marks=pytest.mark.long), 7])
def test_a_killed_growth_is_resumed_with_the_same_bytes(base: Path, tmp_path: Path, num_files: int) -> None:
    options = GrowOptions(should_prove=False, target=Target(shard_bytes=1))
    grow_checkpoint(base / "small", base / "model.yaml", tmp_path / "whole" / "g", options)
    killed = tmp_path / "killed" / "g"
    process = multiprocessing.get_context("fork").Process(
        target=_grow_until_killed, args=(str(base), str(killed), num_files)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not killed.exists()
    assert grow_checkpoint(base / "small", base / "model.yaml", killed, options).num_kept == num_files
    whole = {
        path.relative_to(tmp_path / "whole"): path.read_bytes()
        for path in (tmp_path / "whole").rglob("*")
        if path.is_file()
    }
    again = {
        path.relative_to(tmp_path / "killed"): path.read_bytes()
        for path in (tmp_path / "killed").rglob("*")
        if path.is_file()
    }
    assert again == whole


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["small", "--to", "none.yaml"], 2, "none.yaml: cannot be read"),
        (["small", "--to", "same.yaml"], 2, "nothing grows"),
        (["hf", "--to", "model.yaml"], 3, "import the weights first: megatron-cpt convert import hf CKPT"),
        (["nothing", "--to", "model.yaml"], 2, "no such checkpoint"),
        (["small", "--to", "model.yaml", "--noise", "nan"], 2, "--noise"),
        (["small", "--to", "model.yaml", "--seed", str(10**30)], 2, "--seed"),
        (["small", "--to", "model.yaml", "--output", "small"], 2, "exists already"),
        (["small", "--to", "model.yaml", "--output", "small/out"], 2, "small/out: is inside small, which is an input"),
    ],
)
def test_mistakes_end_with_one_message(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], status: int, message: str
) -> None:
    monkeypatch.chdir(base)
    (base / "same.yaml").write_text("layers: 2\n")
    given = arguments if "--output" in arguments else [*arguments, "--output", "out"]
    assert main(["grow", *given, "--no-proof"]) == status
    assert message in capsys.readouterr().err
    assert not (base / "out").exists()
    assert not (base / ".out.tmp").exists()


def test_a_corrupt_source_is_refused(tmp_path: Path, base: Path) -> None:
    import_checkpoint(base / "hf", tmp_path / "small")
    shard = tmp_path / "small" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    arguments = ["grow", str(tmp_path / "small"), "--to", str(base / "model.yaml"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--no-proof"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_a_model_that_fits_neither_memory_nor_disk_is_refused_before_the_work(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "huge.yaml").write_text("ffn_hidden: 2000000000\n")
    arguments = ["grow", str(base / "small"), "--to", str(tmp_path / "huge.yaml"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "add --no-proof" in capsys.readouterr().err
    assert main([*arguments, "--no-proof"]) == 2
    assert "GB are needed" in capsys.readouterr().err
    assert not (tmp_path / ".out.tmp").exists()
