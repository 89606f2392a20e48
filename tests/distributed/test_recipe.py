"""A recipe from a Hugging Face folder to the first steps of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_cpt.cli import main
from megatron_cpt.recipe.pretraining import read_pretraining
from tests.helpers.hf_models import save_hf_model
from tests.helpers.ranks import run_ranks
from tests.helpers.recipes import write_documents
from tests.helpers.runs import newest, read_metrics, train_here


@pytest.mark.parametrize("family", ["llama", pytest.param("nemotron", marks=pytest.mark.long)])
def test_import_recipe_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.chdir(tmp_path)
    save_hf_model(Path("hf"), family, vocab_size=257, max_position_embeddings=32)
    sources = [write_documents(Path("data", name), documents=200, seed=seed) for seed, name in enumerate(("web", "qa"))]
    arguments = ["--general", f"web={sources[0]}", "--qa", f"qa={sources[1]}", "--split", "20%", "--tokens", "10K"]
    assert main(["recipe", "hf", *arguments, "--propose-lr", "--global-batch", "4"]) == 0
    assert main(["convert", "import", "hf", "checkpoints/hf"]) == 0
    changes = ["stop_at_step=2", "validation.batches=1", "output=out", "log.every=1"]
    run_ranks(1, train_here, "run.yaml", changes)
    lines = [line for line in read_metrics(Path("out")) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["lr"] == yaml.safe_load(Path("run.yaml").read_text())["schedule"]["max_lr"]

    # A run continues where the last one stopped: rate, batch and length as it records them.
    found = read_pretraining(Path("out"))
    assert (found.can_start, found.path) == (True, newest(Path("out")))
    assert found.record.last_rate is not None
    assert found.record.last_rate.value < lines[1]["lr"]
    assert found.record.global_batch is not None
    assert found.record.global_batch.value == 4
