"""Averages against numpy, inputs that do not belong together, killed and resumed averages."""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint.manifest import find_faults
from megatron_cpt.config import ModelConfig
from megatron_cpt.convert import importer
from megatron_cpt.convert.exporter import export_checkpoint
from megatron_cpt.convert.megatron.torch_dist_plan import Target
from megatron_cpt.convert.verify import verify_tensors
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.transform.average import average_checkpoints as module
from megatron_cpt.transform.average.average_checkpoints import AverageOptions, average_checkpoints
from megatron_cpt.transform.average.average_inputs import last_checkpoints
from tests.helpers.averages import assert_is_average
from tests.helpers.checkpoints import read_tensors
from tests.helpers.random_checkpoints import SMALL_MODEL, RandomCheckpoint, trained

NORM = "decoder.final_layernorm.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of one model in three layouts, with 7 to 20 files each."""
    base = tmp_path_factory.mktemp("three")
    targets = (Target(1, 1, 50_000), Target(2, 2, 20_000), Target(4, 1, 1))
    return [RandomCheckpoint(seed=seed, target=target).write(base / f"c{seed}") for seed, target in enumerate(targets)]


def test_the_average_equals_numpy_bit_for_bit(tmp_path: Path, three: list[Path]) -> None:
    report = average_checkpoints(three, tmp_path / "out", AverageOptions(target=Target(2, 2, 30_000)))
    assert_is_average(tmp_path / "out", three, [1 / 3] * 3, torch.float32)
    assert find_faults(tmp_path / "out") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert report.num_kept == 0
    assert report.input_bytes == 3 * report.num_bytes


def test_the_order_of_the_sum_is_that_of_the_arguments(tmp_path: Path, three: list[Path]) -> None:
    weights = (0.5, 0.3, 0.2)
    average_checkpoints(three, tmp_path / "out", AverageOptions(weights=weights))
    assert_is_average(tmp_path / "out", three, weights, torch.float32)
    reverse = AverageOptions(weights=weights[::-1])
    average_checkpoints(three[::-1], tmp_path / "reversed", reverse)
    with pytest.raises(AssertionError):  # so a wrong order would be found
        assert_is_average(tmp_path / "reversed", three, weights, torch.float32)


def test_tensors_larger_than_a_block(tmp_path: Path, three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)  # 5 rows of the embedding
    monkeypatch.setattr(module, "_CACHED_ELEMENTS", 100)
    average_checkpoints(three, tmp_path / "out")
    assert_is_average(tmp_path / "out", three, [1 / 3] * 3, torch.float32)


@pytest.mark.parametrize("wanted", [None, "bf16"])
def test_bf16_and_fp32_inputs_are_rounded_once(tmp_path: Path, three: list[Path], wanted: str | None) -> None:
    half = RandomCheckpoint(seed=7, dtype=torch.bfloat16).write(tmp_path / "half")
    report = average_checkpoints([half, three[0]], tmp_path / "out", AverageOptions(dtype=wanted))
    dtype = torch.bfloat16 if wanted else torch.float32
    assert_is_average(tmp_path / "out", [half, three[0]], [0.5, 0.5], dtype)
    assert any("dtype differs: bfloat16" in note and "float32" in note for note in report.notes)


def test_equal_checkpoints_average_to_themselves(tmp_path: Path) -> None:
    paths = [
        RandomCheckpoint(seed=3, dtype=torch.bfloat16, target=Target(tensor)).write(tmp_path / f"c{tensor}")
        for tensor in (1, 2, 4)
    ]
    average_checkpoints(paths, tmp_path / "out")
    average, original = read_tensors(tmp_path / "out"), read_tensors(paths[0])
    assert all(torch.equal(average[name], original[name]) for name in original)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = ModelConfig(**{**SMALL_MODEL.model_dump(), "tied_embeddings": True, "qkv_bias": True, "norm": "rmsnorm"})
    paths = [RandomCheckpoint(seed=seed, model=model).write(tmp_path / f"c{seed}") for seed in range(2)]
    average_checkpoints(paths, tmp_path / "out")
    assert "output_layer.weight" not in read_tensors(tmp_path / "out")
    assert_is_average(tmp_path / "out", paths, [0.5, 0.5], torch.float32)


def test_a_hugging_face_folder_is_an_input_and_the_result_is_exported(tmp_path: Path, three: list[Path]) -> None:
    def clear_padding(tensors: dict[str, torch.Tensor]) -> None:  # an export cuts it, and a read adds zeros
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            tensors[name][SMALL_MODEL.vocab :] = 0

    own = RandomCheckpoint(seed=8, change=clear_padding).write(tmp_path / "own")
    export_checkpoint(own, tmp_path / "hf")
    average_checkpoints([three[0], tmp_path / "hf"], tmp_path / "out")
    assert_is_average(tmp_path / "out", [three[0], own], [0.5, 0.5], torch.float32)
    digest = json.loads((tmp_path / "out" / "manifest.json").read_text())["provenance"]["inputs"][1]["digest"]
    assert digest.startswith("xxh3_128 of files: ")
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    assert verify_tensors(tmp_path / "back", tmp_path / "out").is_equal


def test_the_manifest_names_inputs_digests_and_weights(tmp_path: Path) -> None:
    paths = [
        RandomCheckpoint(seed=step, state=trained(step), run={"tokenizer": "byte", "seq_length": 32}).write(
            tmp_path / f"step-{step:08d}"
        )
        for step in (100, 200, 400)
    ]
    report = average_checkpoints(paths, tmp_path / "out", AverageOptions(decay="linear"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    provenance = manifest["provenance"]
    assert provenance["weights"] == "linear"
    assert [entry["path"] for entry in provenance["inputs"]] == [str(path) for path in paths]
    assert [entry["step"] for entry in provenance["inputs"]] == [100, 200, 400]
    assert len({entry["digest"] for entry in provenance["inputs"]}) == 3
    # the decay ends a mean interval of 150 steps after step 400: 100, 200 and 150 of 450 steps
    assert [entry["weight"] for entry in provenance["inputs"]] == pytest.approx([2 / 9, 4 / 9, 3 / 9], rel=1e-6)
    assert report.inputs == provenance["inputs"]
    run = (tmp_path / "out" / "run.yaml").read_text()
    assert "tokenizer: byte" in run
    assert "seq_length: 32" in run


def test_a_decay_warns_of_a_rate_that_falls_already(tmp_path: Path) -> None:
    paths = [
        RandomCheckpoint(seed=step, state=trained(step, next_rate=1e-3 / step)).write(tmp_path / f"c{step}")
        for step in (1, 2)
    ]
    report = average_checkpoints(paths, tmp_path / "out", AverageOptions(decay="minus-sqrt"))
    assert any("learning rate changes from 0.001 to 0.0005" in note for note in report.notes)


# ------------------------------------------------------------------------------------------ refused inputs


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rotary_percent", 0.5, r"model\.rotary_percent: 1\.0 and 0\.5"),
        ("vocab", 99, r"model\.vocab: 101 and 99"),
        ("layers", 3, r"model\.layers: 2 and 3"),
        ("tied_embeddings", True, r"model\.tied_embeddings: False and True"),
    ],
)
def test_another_architecture_is_refused_by_its_field(
    tmp_path: Path, three: list[Path], field: str, value: Any, message: str
) -> None:
    model = ModelConfig(**{**SMALL_MODEL.model_dump(), field: value})
    other = RandomCheckpoint(model=model).write(tmp_path / "other")
    with pytest.raises(RefusedError, match=message):
        average_checkpoints([three[0], other], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_another_dropout_is_a_note(tmp_path: Path, three: list[Path]) -> None:
    model = SMALL_MODEL.model_copy(update={"hidden_dropout": 0.1, "max_positions": 4096})
    other = RandomCheckpoint(seed=1, model=model).write(tmp_path / "other")
    report = average_checkpoints([three[0], other], tmp_path / "out")
    assert any("model.hidden_dropout differs: 0.0" in note for note in report.notes)
    assert any("model.max_positions differs: None" in note for note in report.notes)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"a": 0}')
    (tmp_path / "two.json").write_text('{"a": 1}')
    first, second = (
        RandomCheckpoint(seed=1, side_files={"tokenizer.json": tmp_path / name}).write(tmp_path / name[:3])
        for name in ("one.json", "two.json")
    )
    third = RandomCheckpoint(state=trained(10, tokenizer_fingerprint="0" * 64)).write(tmp_path / "run")
    for other in (second, third):
        with pytest.raises(RefusedError, match="have different tokenizers"):
            average_checkpoints([first, other], tmp_path / "out")
    unknown = RandomCheckpoint(seed=2).write(tmp_path / "unknown")
    report = average_checkpoints([first, unknown], tmp_path / "out")
    assert any(f"was not compared: {unknown}" in note for note in report.notes)


def test_a_missing_tensor_is_named(tmp_path: Path, three: list[Path]) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[NORM]

    other = RandomCheckpoint(change=drop).write(tmp_path / "other")
    with pytest.raises(RefusedError, match=rf"(?s)other: 1 tensors .*{NORM}: missing"):
        average_checkpoints([three[0], other], tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, three: list[Path], value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FC2][3] = value

    other = RandomCheckpoint(change=spoil).write(tmp_path / "other")
    with pytest.raises(RefusedError, match=rf"{FC2}: holds weights that are NaN or infinite in {other};"):
        average_checkpoints([three[0], other], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_sum_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FC2].fill_(1e30)

    paths = [RandomCheckpoint(seed=seed, change=large).write(tmp_path / f"c{seed}") for seed in range(2)]
    with pytest.raises(RefusedError, match=r"1e\+30, too large for torch\.float16; choose bf16 or fp32"):
        average_checkpoints(paths, tmp_path / "out", AverageOptions(dtype="fp16"))


def test_a_damaged_shard_is_refused(tmp_path: Path, three: list[Path]) -> None:
    other = shutil.copytree(three[1], tmp_path / "other")
    shard = other / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RefusedError, match=r"other: corrupt: __1_0\.distcp: checksum differs"):
        average_checkpoints([three[0], other], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_an_input_that_is_deleted_while_it_is_read(
    tmp_path: Path, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(three[1], tmp_path / "other")
    real = importer.write_file

    def write(*args: Any, **kwargs: Any) -> Any:
        shutil.rmtree(other, ignore_errors=True)
        return real(*args, **kwargs)

    monkeypatch.setattr(importer, "write_file", write)
    with pytest.raises(RefusedError, match=r"other/.*: was removed since it was opened"):
        average_checkpoints([three[0], other], tmp_path / "out", AverageOptions(target=Target(shard_bytes=1)))
    assert list(tmp_path.iterdir()) == []


def test_paths_that_make_no_average(tmp_path: Path, three: list[Path]) -> None:
    link = tmp_path / "link"
    link.symlink_to(three[0])
    cases = [
        ([three[0]], tmp_path / "out", "at least two checkpoints"),
        ([three[0], three[1], link], tmp_path / "out", "named twice"),
        ([three[0], three[1]], three[1] / "out", "is inside .*c1, which is an input"),
        ([three[0], three[1]], link / "a" / "b", "is inside .*c0, which is an input"),
        ([three[0], tmp_path / "none"], tmp_path / "out", "none: no such folder"),
        ([three[0], three[1]], three[2], "exists already"),
    ]
    for paths, output, message in cases:
        with pytest.raises(UserError, match=message):
            average_checkpoints(paths, output)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    assert {path.name for path in three[0].parent.iterdir()} == {"c0", "c1", "c2"}


def test_a_run_with_too_few_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    steps = {
        step: RandomCheckpoint(seed=step, state=trained(step)).write(folder / f"step-{step:08d}") for step in (5, 10)
    }
    shutil.copytree(steps[10], folder / "step-00000099")  # a copy under another step's name
    assert last_checkpoints(tmp_path / "run", 2) == [steps[5], steps[10]]
    with pytest.raises(UserError, match=r"--last 3: .*run has 2: step-00000005, step-00000010"):
        last_checkpoints(tmp_path / "run", 3)
    with pytest.raises(UserError, match="no such run directory"):
        last_checkpoints(tmp_path / "none", 2)
    with pytest.raises(RefusedError, match="holds no checkpoint"):
        last_checkpoints(tmp_path, 2)


# ------------------------------------------------------------------------------------------ killed


def _average_until_killed(paths: Sequence[Path], output: Path, moment: str) -> None:
    written: list[Any] = []

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(path: Path, plan: Any, specs: Any, tensor: int, read: Any, advance: Any) -> Any:
        if moment == "in the second file" and written:
            return real(path, plan, specs, tensor, read, die)  # once a first piece is written
        written.append(real(path, plan, specs, tensor, read, advance))
        return written[-1]

    real = importer.write_file
    importer.write_file = write
    if moment == "before the records":
        module.write_records = die  # type: ignore[assignment]
    if moment == "before the rename":
        importer.JobFolder.publish = die  # type: ignore[method-assign]
    average_checkpoints(paths, output, replace(OPTIONS, workers=1))


OPTIONS = AverageOptions(weights=(0.5, 0.3, 0.2), target=Target(2, 1, 30_000))


@pytest.mark.parametrize(
    ("moment", "has_all_files"),
    [("in the second file", False), ("before the records", True), ("before the rename", True)],
)
def test_a_killed_average_is_resumed_with_the_same_bytes(
    tmp_path: Path, three: list[Path], moment: str, has_all_files: bool
) -> None:
    whole, output = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    expected = average_checkpoints(three, whole, OPTIONS)
    process = multiprocessing.get_context("fork").Process(target=_average_until_killed, args=(three, output, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()
    report = average_checkpoints(three, output, OPTIONS)
    # the file with the FP8 entries is kept too, if it was written
    assert report.num_kept == expected.num_files + 1 if has_all_files else 0 < report.num_kept < expected.num_files
    names = sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(whole, output, names, shallow=False) == (names, [], [])
    assert sorted(path.name for path in output.parent.iterdir()) == ["out"]


def test_other_weights_restart_from_scratch(tmp_path: Path, three: list[Path]) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_average_until_killed, args=(three, tmp_path / "out", "before the records")
    )
    process.start()
    process.join()
    report = average_checkpoints(three, tmp_path / "out")
    assert report.num_kept == 0
    assert_is_average(tmp_path / "out", three, [1 / 3] * 3, torch.float32)
