"""Command `recipe` on tiny Hugging Face folders and on a Megatron checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_cpt.cli import main
from megatron_cpt.config import parse_count
from megatron_cpt.data import IndexedDataset
from megatron_cpt.errors import UserError
from megatron_cpt.planning.timeline.schedule import Schedule
from megatron_cpt.recipe.commented_yaml import Reasoned
from megatron_cpt.recipe.pretraining import read_pretraining
from megatron_cpt.recipe.training_values import choose_max_lr
from tests.helpers.document_lists import write_list
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


def documents_of(prefix: str) -> list[bytes]:
    dataset = IndexedDataset(prefix)
    return [dataset.document(number).tobytes() for number in range(dataset.num_documents)]


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
    assert "web-train: is a split of web at 10% (seed 1234), but of other data" in capsys.readouterr().err
    assert recipe(models / "llama", "--max-lr", "1e-4", "--output", "c.yaml", "--split-dir", "new") == 0


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("has_sidecar", [True, False])
def test_a_split_of_other_data_of_the_same_name(
    models: Path, capsys: pytest.CaptureFixture[str], has_sidecar: bool
) -> None:
    for folder, seed in (("data", 0), ("other", 9)):
        write_documents(Path(folder, "web"), documents=400, seed=seed)
        if not has_sidecar:
            Path(folder, "web.json").unlink()
    os.utime("other/web.bin", (0, 0))
    assert recipe(models / "llama", "--max-lr", "1e-4", "--output", "a.yaml") == 0
    other = ["--general", "web=other/web", "code=data/code", "--qa", "stem=data/stem", "--split", "10%"]
    other += ["--tokens", "20K", "--max-lr", "1e-4", "--output", "b.yaml"]
    assert main(["recipe", str(models / "llama"), *other]) == 2
    assert "but of other data of this name" in " ".join(capsys.readouterr().err.split())
    Path("copy").mkdir()
    for path in Path("data").glob("web.*"):
        shutil.copy2(path, "copy")
    other[1] = "web=copy/web"
    assert main(["recipe", str(models / "llama"), *other]) == 0


@pytest.mark.usefixtures("data")
def test_overwrite_replaces_the_run_yaml_alone(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = ["--max-lr", "1e-4"], ["--max-lr", "2e-4", "--overwrite"]
    assert recipe(models / "llama", *first) == 0
    split = {name: os.stat(name).st_mtime_ns for name in files() if name.startswith("split")}
    assert recipe(models / "llama", *second) == 0
    assert yaml.safe_load(Path("run.yaml").read_text())["schedule"]["max_lr"] == 2e-4
    write_documents(Path("data", "more"), documents=100, seed=7)
    for other in (["--split", "20%"], ["--general", "web=data/more"]):
        for overwrite in ([], ["--overwrite"]):
            capsys.readouterr()
            assert recipe(models / "llama", *first, *other, *overwrite, "--output", "other.yaml") == 2
            message = capsys.readouterr().err
            assert "--split-dir" in message
            found = "20% (seed 1234)" if other[0] == "--split" else "a split of web at 10% (seed 1234), not of"
            assert found in message
    assert {name: os.stat(name).st_mtime_ns for name in split} == split
    assert not Path("other.yaml").exists()
    Path("folder").mkdir()
    assert recipe(models / "llama", *second, "--output", "folder") == 2
    assert "folder: is a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("batch", [[], ["--global-batch", "8"]])
def test_the_advised_number_of_tokens_passes(
    models: Path, capsys: pytest.CaptureFixture[str], batch: list[str]
) -> None:
    options = [models / "llama", "--max-lr", "1e-4", *batch]
    assert recipe(*options, "--tokens", "10M") == 2
    advised = re.search(r"give --tokens (\S+), or add data", " ".join(capsys.readouterr().err.split()))
    assert advised
    assert parse_count(advised[1]) > 60_000  # of the 120,000 tokens in four epochs of general data
    assert recipe(*options, "--tokens", advised[1]) == 0
    # Enough data before the split, too little after it
    assert recipe(*options, "--tokens", "118K", "--output", "b.yaml") == 2
    advised = re.search(r"give --tokens (\S+), or add data", " ".join(capsys.readouterr().err.split()))
    assert advised
    assert recipe(*options, "--tokens", advised[1], "--output", "b.yaml") == 0


@pytest.mark.usefixtures("data")
def test_document_lists(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    web = IndexedDataset("data/web")
    write_list(Path("data/mined.docs"), [web], [(0, number) for number in range(200)])
    mined = ["--max-lr", "1e-4", "--general", "mined=data/mined.docs"]

    def refusal(*options: str) -> str:
        assert recipe(models / "llama", *mined, *options) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "mine a dataset instead of a list: `megatron-cpt mine --output data/mined`" in refusal()
    write_documents(Path("data", "other"), documents=60, seed=7)
    leaked = "data/mined.docs: has documents that --split holds out of source web"
    assert leaked in refusal("--held-out", "mined=data/other")
    assert "is also trained on, as source web" in refusal("--held-out", "mined=data/mined.docs")

    assert recipe(models / "llama", "--max-lr", "1e-4") == 0
    held_out = set(documents_of("split/web-held-out"))
    rest = [(0, number) for number, text in enumerate(documents_of("data/web")) if text not in held_out]
    assert 0 < len(rest) < 400
    write_list(Path("data/mined.docs"), [web], rest)
    given = ["--held-out", "mined=data/other", "--output", "mined.yaml"]
    assert recipe(models / "llama", *mined, *given) == 0
    write_list(Path("data/mined.docs"), [IndexedDataset("split/web-train")], [(0, number) for number in range(100)])
    given = ["--held-out", "mined=split/web-held-out", "--output", "train.yaml"]
    assert recipe(models / "llama", *mined, *given) == 0
    run = yaml.safe_load(Path("train.yaml").read_text())
    assert run["sources"]["mined"]["path"] == "data/mined.docs"
    assert main(["plan", "train.yaml"]) == 0


@pytest.mark.usefixtures("data")
def test_lists_of_the_same_dataset_may_not_share_documents(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    web = IndexedDataset("data/web")
    write_list(Path("train.docs"), [web], [(0, number) for number in range(300)])
    arguments = ["--general", "web=train.docs", "--qa", "stem=data/stem", "--tokens", "5K", "--max-lr", "1e-4"]
    arguments += ["--held-out", "stem=data/chat", "web=held.docs"]
    write_list(Path("held.docs"), [web], [(0, number) for number in range(299, 400)])
    assert main(["recipe", str(models / "llama"), *arguments]) == 2
    assert "--held-out web=held.docs: is also trained on" in capsys.readouterr().err
    write_list(Path("held.docs"), [web], [(0, number) for number in range(300, 400)])
    assert main(["recipe", str(models / "llama"), *arguments]) == 0


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held-out", "web=data/copy"], "--held-out web=data/copy: is also trained on, as source web"),
        (["--held-out", "code=data/link"], "--held-out code=data/link: is also trained on, as source web"),
        (["--held-out", "code=data/all.docs"], "--held-out code=data/all.docs: is also trained on, as source web"),
        (["--general", "web=data/web", "web2=data/web"], "source web2: data/web: has the same documents as data/web"),
        (
            ["--general", "web=data/web", "web=./data/web"],
            "./data/web, data/web is named more than once, under several paths",
        ),
        (["--general", "web=data/web", "web=data/copy"], "source web: data/copy: has the same documents as data/web"),
        (["--general", "web=data/web", "web2=data/link"], "source web2: data/link: has the same documents"),
        (["--general", "web=data/web", "--qa", "qa=data/web"], "source qa: data/web: has the same documents"),
        (["--general", "web=data/web", "l=data/all.docs", "--held-out", "l=data/chat"], "source l: data/all.docs: has"),
        (["--general", "web=data/web", "l=data/few.docs", "--held-out", "l=data/chat"], "source l: data/few.docs: has"),
    ],
)
@pytest.mark.parametrize("has_sidecar", [True, False])
def test_copies_and_links_are_the_same_data(
    models: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str, has_sidecar: bool
) -> None:
    for ending in (".bin", ".idx", *([".json"] if has_sidecar else [])):
        shutil.copy(f"data/web{ending}", f"data/copy{ending}")
        os.link(f"data/web{ending}", f"data/link{ending}")
    write_list(Path("data/all.docs"), [IndexedDataset("data/web")], [(0, number) for number in range(400)])
    write_list(Path("data/few.docs"), [IndexedDataset("data/copy")], [(0, number) for number in range(100)])
    arguments = ["--general", "web=data/web", "code=data/code", "--qa", "stem=data/stem", "--split", "10%"]
    for option in ("--general", "--qa"):
        if option in options:
            at = arguments.index(option)
            stop = next((n for n in range(at + 1, len(arguments)) if arguments[n].startswith("--")), len(arguments))
            del arguments[at:stop]
    assert main(["recipe", str(models / "llama"), *arguments, *options, "--tokens", "5K", "--max-lr", "1e-4"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("run.yaml").exists()


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
        *((["--max-lr", rate], f"--max-lr {rate}: give a") for rate in ("nan", "inf", "0", "1e+300", "-1")),
        *((["--max-lr", "1e-4", "--quality", f"web={factor}"], "give one factor") for factor in ("nan", "inf")),
        (["--max-lr", "1e-4", "--split", "nan"], "--split nan: give a share"),
        (["--max-lr", "1e-4", "--output", "no/such/run.yaml"], "no/such: no such folder; create it"),
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


@pytest.mark.parametrize("rate", [1e300, 2.0, 1e-300])
def test_a_recorded_rate_must_be_usable(rate: float) -> None:
    found = read_pretraining(FIXTURE)
    damaged = replace(found, record=replace(found.record, last_rate=Reasoned(rate, "state.json")))
    with pytest.raises(UserError, match=r"ended on is .* \(state.json\).* give a learning rate from"):
        choose_max_lr(damaged, given=None, propose=False)
    assert choose_max_lr(damaged, given=1e-4, propose=False).value == 1e-4


def test_a_megatron_checkpoint_records_its_last_rate() -> None:
    found = read_pretraining(FIXTURE)
    assert not found.can_start
    assert found.record.last_rate is not None
    assert found.record.last_rate.value == Schedule("cosine", 1e-3, 1e-5, 10).rate(3)  # after 2 of 10 steps
