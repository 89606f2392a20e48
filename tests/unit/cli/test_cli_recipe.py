"""Command `recipe` on tiny Hugging Face folders and on a Megatron checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from megatron_cpt.cli import main
from megatron_cpt.planning.timeline.schedule import Schedule
from megatron_cpt.recipe.pretraining import read_pretraining
from tests.helpers.hf_models import save_hf_model
from tests.helpers.recipes import values_without_comment, write_documents

FIXTURE = Path(__file__).parents[2] / "fixtures" / "megatron_core_0.19" / "checkpoint"
NEW_LINE = "chat\nQ&A: {x}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "nemotron"):
        save_hf_model(folder / family, family, vocab_size=257, max_position_embeddings=32)
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, (name, documents) in enumerate({"web": 400, "code": 100, "stem": 60, "chat": 60}.items()):
        write_documents(Path("data", name), documents=documents, seed=seed)


def recipe(checkpoint: object, *options: str) -> int:
    sources = ["--general", "web=data/web", "code=data/code", "--qa", "stem=data/stem", f"{NEW_LINE}=data/chat"]
    return main(["recipe", str(checkpoint), *sources, "--tokens", "20K", "--split", "10%", *options])


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file() and path.parts[0] != "data"}


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_a_hugging_face_folder(models: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = Path("results.json")
    results.write_text(json.dumps({"results": {"mmlu_stem": {"acc": 0.2}, "mt": {"acc": 0.6}}}))
    areas = ["--evaluation", "results.json", "--area", "mmlu_stem=stem", f"mt={NEW_LINE}"]
    assert recipe(models / family, "--max-lr", "1e-4", "--quality", "code=2", *areas) == 0
    out = capsys.readouterr().out
    assert f"convert import {models / family} checkpoints/{family}" in out
    text = Path("run.yaml").read_text()
    assert values_without_comment(text) == []
    run = yaml.safe_load(text)
    assert run["init"]["from"] == f"checkpoints/{family}"
    assert run["schedule"]["max_lr"] == 1e-4
    assert list(run["sources"]) == list(run["validation"]["sources"]) == ["web", "code", "stem", NEW_LINE]
    blend = run["phases"][1]["blend"]
    assert blend["stem"] > 1.5 * blend[NEW_LINE]  # errors of 0.8 and 0.4
    assert main(["plan", "run.yaml"]) == 0


@pytest.mark.usefixtures("data")
def test_a_split_is_written_once(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe(models / "llama", "--max-lr", "1e-4", "--output", "a.yaml") == 0
    split = {name: os.stat(name).st_mtime_ns for name in files() if name.startswith("split")}
    assert len(split) == 4 * 2 * 3
    assert recipe(models / "llama", "--max-lr", "2e-4", "--output", "b.yaml") == 0
    assert {name: os.stat(name).st_mtime_ns for name in split} == split
    assert recipe(models / "llama", "--max-lr", "2e-4", "--output", "b.yaml") == 2
    assert "b.yaml: exists already" in capsys.readouterr().err
    write_documents(Path("data", "web"), documents=300, seed=9)
    assert recipe(models / "llama", "--max-lr", "1e-4", "--output", "c.yaml") == 2
    assert "split/web-held-out.bin" in capsys.readouterr().err
    assert recipe(models / "llama", "--max-lr", "1e-4", "--output", "c.yaml", "--overwrite") == 0


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "does not record the learning rate"),
        (["--max-lr", "1e-4", "--tokens", "10M"], "four epochs of the general sources are"),
        (["--max-lr", "1e-4", "--tokens", "32"], "too few to reach a fifth"),
        (["--max-lr", "1e-4", "--split", "0.0001%"], "0 of its 400 documents would be held out"),
        (["--max-lr", "1e-4", "--split", "2"], "--split 2: give a share"),
        (["--max-lr", "1e-4", "--seq-length", "4000", "--split", "50%"], "too few for one sample"),
        (["--max-lr", "1e-4", "--held-out", "web=data/code"], "is also trained on, as source code"),
        (["--max-lr", "1e-4", "--quality", "stem=2"], "--quality stem: no such source"),
        (["--max-lr", "1e-4", "--area", "mmlu=stem"], "needs the result of an evaluation"),
        (["--max-lr", "1e-4", "--qa", "web=data/chat"], "is also a general source"),
        (["--max-lr", "1e-4", "--gpus", "8"], "give both --gpus N and --gpu NAME"),
    ],
)
def test_a_mistake_leaves_nothing_behind(
    models: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert recipe(models / "llama", *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert files() == set()
    assert not Path("split").exists()


@pytest.mark.usefixtures("data")
def test_held_out_data_is_required(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--general", "web=data/web", "--qa", "stem=data/stem", "--tokens", "20K", "--max-lr", "1e-4"]
    assert main(["recipe", str(models / "llama"), *arguments]) == 2
    assert "source web: no held-out data" in capsys.readouterr().err
    given = ["--held-out", "web=data/code", "stem=data/chat", "--gpus", "2", "--gpu", "h100"]
    assert main(["recipe", str(models / "llama"), *arguments, *given]) == 0
    run = yaml.safe_load(Path("run.yaml").read_text())
    assert run["validation"]["sources"] == {"web": "data/code", "stem": "data/chat"}
    assert run["precision"] == {"compute": "bf16"}
    assert values_without_comment(Path("run.yaml").read_text()) == []
    assert files() == {"run.yaml"}


def test_a_megatron_checkpoint_records_its_last_rate() -> None:
    found = read_pretraining(FIXTURE)
    assert not found.can_start
    assert found.record.last_rate is not None
    assert found.record.last_rate.value == Schedule("cosine", 1e-3, 1e-5, 10).rate(3)  # after 2 of 10 steps
