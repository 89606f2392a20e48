"""The model card of an export, and the ids that begin and end a document."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

import megatron_cpt as cpt
from megatron_cpt.checkpoint.record import read_saved_run
from megatron_cpt.config import dump_yaml, read_mapping
from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
from megatron_cpt.convert.importer import import_checkpoint
from megatron_cpt.convert.model_card import _losses, describe_training, write_model_card
from tests.helpers.faults import seal_again
from tests.helpers.hf_models import save_hf_model
from tests.helpers.runs import small_run

BASE_CARD = "---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: somebody/else\n---\n# The base\n"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as the Hub's cache names it, with a card."""
    folder = tmp_path_factory.mktemp("hub") / "models--lab--tiny" / "snapshots" / "0a1b"
    save_hf_model(folder, "llama")
    (folder / "README.md").write_text(BASE_CARD)
    return folder


@pytest.fixture(scope="module")
def base(hf: Path) -> Path:
    return import_checkpoint(hf, hf.parents[2] / "base") and hf.parents[2] / "base"


def trained(folder: Path, weights: Path, *, step: int, start: Path | None, **changes: Any) -> Path:
    """Return a run directory whose checkpoint has the weights of another one and the records of a trained run."""
    model = read_mapping(weights / "run.yaml")["model"]
    init = {"from": str(start) if start else None}
    run = cpt.load_run(small_run(folder, name="our-model", model=model, init=init, **changes))
    plan = cpt.plan(run)
    checkpoint = folder / "out" / "checkpoints" / f"step-{step:08d}"
    shutil.copytree(weights, checkpoint)
    shutil.rmtree(checkpoint / "hf", ignore_errors=True)  # training saves none
    state = json.loads((checkpoint / "state.json").read_text())
    del state["imported"]
    samples = {"web": 70, "code": 50, "qa": step}
    state["train"] |= {"step": step, "tokens": step * 8 * 32, "samples_by_source": samples}
    state["next_rate"] = plan.schedule.rate(min(step + 1, plan.steps))
    (checkpoint / "state.json").write_bytes(orjson.dumps(state))
    (checkpoint / "run.yaml").write_text(dump_yaml(run.to_dict()))
    (checkpoint / "plan.json").write_bytes(orjson.dumps(plan.to_dict()))
    names = [path for path in json.loads((checkpoint / "manifest.json").read_text())["files"] if "hf/" not in path]
    assert "plan.json" not in names
    _write_manifest(checkpoint, [*names, "plan.json"])
    lines: list[dict[str, Any]] = [
        {"step": 0, "validation": {"held": 6.5}},
        {"step": step, "loss": 3.25, "loss_by_source": {"web": 3.0, "qa": None}},
        {"step": step, "validation": {"held": 4.125}},
        {"step": step + 1, "loss": 1.0, "loss_by_source": {}},
    ]
    text = b"".join(orjson.dumps(line) + b"\n" for line in lines)
    (folder / "out" / "metrics.jsonl").write_bytes(text + b'{"step": 2')
    return folder / "out"


def _write_manifest(checkpoint: Path, names: list[str]) -> None:
    from megatron_cpt.checkpoint.manifest import digest, manifest_text

    (checkpoint / "manifest.json").write_text(manifest_text({name: digest(checkpoint / name) for name in names}))


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_training_loss_is_not_said_to_be_that_of_an_average(tmp_path: Path, base: Path) -> None:
    saved = read_saved_run(next((trained(tmp_path / "run", base, step=18, start=base) / "checkpoints").glob("step-*")))
    assert _losses(saved, "raw")[0] == "Training loss at step 18: 3.2500 (web 3.0000)."
    assert _losses(saved, "ema")[0].startswith("Training loss of the weights that were averaged at step 18: 3.2500")


def test_a_card_says_what_was_done_and_keeps_the_card_of_the_base(tmp_path: Path, hf: Path, base: Path) -> None:
    run = trained(tmp_path / "run", base, step=18, start=base)
    report = export_checkpoint(run, tmp_path / "out")
    assert {"README.md", "README_base.md"} <= set(report.side_files)
    assert (tmp_path / "out" / "README_base.md").read_text() == BASE_CARD
    front, text = read_card(tmp_path / "out")
    assert front == {
        "library_name": "transformers",
        "base_model": "lab/tiny",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["continued-pretraining", "megatron-core", "megatron-cpt"],
    }
    assert text.startswith("\n# our-model\n\nThis model was continued from `lab/tiny`")
    plan = cpt.plan(cpt.load_run(tmp_path / "run" / "run.yaml"))
    web = 70 / plan.sources["web"].spans_per_epoch
    for line in (
        f"| base checkpoint | `{base}`, weights |",
        "| steps | 18 of 20 |",
        "| tokens | 4.608K of 5.12K |",
        "| schedule | cosine, 0.001 to 1e-05 |",
        "| optimizer | adam, betas 0.9 and 0.95, weight decay 0.1, gradient norm clipped at 1 |",
        "| precision | fp32 |",
        f"| qa | 16 to 18 of 20 | {plan.phases[1].lr_first:.3g} to {plan.schedule.rate(19):.3g} | "
        "web 0.5, code 0.3, qa 0.2 |",
        f"| web | 70 | 2.24K | {web:.2f} |",
        "Training loss at step 18: 3.2500 (web 3.0000).",
        "| held-out source | step 0 | step 18 |",
        "| held | 6.5000 | 4.1250 |",
    ):
        assert line in text.splitlines(), text


def test_a_run_that_started_from_a_run_names_the_first_base_and_keeps_both_cards(tmp_path: Path, base: Path) -> None:
    first = trained(tmp_path / "first", base, step=20, start=base)
    second = trained(tmp_path / "second", base, step=20, start=first)
    export_checkpoint(second, tmp_path / "out")
    front, text = read_card(tmp_path / "out")
    assert front["base_model"] == "lab/tiny"
    assert f"| base checkpoint | `{base}`, weights |" in text
    import_checkpoint(tmp_path / "out", tmp_path / "again")
    third = trained(tmp_path / "third", tmp_path / "again", step=20, start=tmp_path / "again")
    names = export_checkpoint(third, tmp_path / "third-out").side_files
    assert {"README.md", "README_base.md", "README_base_2.md"} <= set(names)
    assert (tmp_path / "third-out" / "README_base.md").read_text() == BASE_CARD


def test_front_matter_is_kept_as_text_and_a_name_cannot_add_lines(tmp_path: Path, base: Path) -> None:
    run = trained(tmp_path / "run", base, step=20, start=base)
    checkpoint = run / "checkpoints" / "step-00000020"
    saved = read_saved_run(checkpoint)
    saved = replace(saved, run={**saved.run, "name": "our\n---\nlicense: other"})
    assert "# our --- license: other" in describe_training(saved, {}).splitlines()
    side = tmp_path / "side" / "README.md"
    side.parent.mkdir()
    side.write_text("\ufeff---\nlicense_name: 1.10\nlicense_link:\nlanguage:\n- no\n- en\n---\n")
    (tmp_path / "out").mkdir()
    shutil.copyfile(side, tmp_path / "out" / "README.md")
    write_model_card(tmp_path / "out", checkpoint, {"README.md": side})
    front, _ = read_card(tmp_path / "out")
    assert (front["license_name"], front["language"]) == ("1.10", ["no", "en"])
    assert "license_link" not in front


def test_an_imported_checkpoint_keeps_its_card_unchanged(tmp_path: Path, base: Path) -> None:
    assert "README_base.md" not in export_checkpoint(base, tmp_path / "out").side_files
    assert (tmp_path / "out" / "README.md").read_text() == BASE_CARD


def test_samples_of_several_lengths_have_no_guessed_tokens(tmp_path: Path, base: Path) -> None:
    phases = [
        {"name": "a", "blend": {"web": 0.6, "code": 0.4}, "until": {"step": 10}},
        {"name": "b", "blend": {"qa": 1.0}, "seq_length": 64},
    ]
    run = trained(tmp_path / "run", base, step=12, start=base, phases=phases)
    export_checkpoint(run, tmp_path / "out")
    assert "| web | 70 | unknown | unknown |" in read_card(tmp_path / "out")[1]


def test_records_that_lack_a_fact_cost_the_card_and_not_the_export(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(tmp_path / "run", base, step=20, start=base)
    checkpoint = run / "checkpoints" / "step-00000020"
    (checkpoint / "plan.json").write_text("{}")
    seal_again(checkpoint)
    with caplog.at_level(logging.WARNING):
        export_checkpoint(run, tmp_path / "out")
    assert "no model card is written" in caplog.text
    assert (tmp_path / "out" / "README.md").read_text() == BASE_CARD


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{n}": n for n in range(97)} | {"<s>": 97, "<|endoftext|>": 98, "<|im_end|>": 99}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("documents", "eos"), [({}, 98), ({"eod_id": 7}, 7)])
def test_a_model_from_scratch_gets_its_special_ids_from_the_tokenizer(
    tmp_path: Path, base: Path, tokenizer: Path, documents: dict[str, int], eos: int
) -> None:
    run = trained(tmp_path / "run", base, step=20, start=None, documents=documents)
    report = export_checkpoint(run, tmp_path / "out", ExportOptions(files=tokenizer))
    assert "generation_config.json" in report.side_files
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == (97, eos)
    front, text = read_card(tmp_path / "out")
    assert "base_model" not in front
    assert front["tags"] == ["megatron-core", "megatron-cpt"]
    assert "was trained from random weights" in text


def test_without_a_tokenizer_the_ids_are_null_instead_of_the_defaults_of_a_class(tmp_path: Path, base: Path) -> None:
    from transformers import AutoConfig

    run = trained(tmp_path / "run", base, step=20, start=None)
    report = export_checkpoint(run, tmp_path / "out")
    assert "generation_config.json" not in report.side_files
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
