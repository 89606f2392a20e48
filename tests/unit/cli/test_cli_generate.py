"""`megatron-cpt generate`: its output, its options and the mistakes it refuses."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli import main
from megatron_cpt.convert import temporary_checkpoint
from megatron_cpt.convert.importer import import_checkpoint
from megatron_cpt.files.resumable import SETTINGS_FILE
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors
from tests.helpers.hf_models import save_hf_model

PROMPTS = ("--prompt", "Paris is", "--prompt", "def")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("generate")
    save_hf_model(base / "hf", "llama", vocab_size=257)
    import_checkpoint(base / "hf", base / "checkpoint")
    return base / "checkpoint"


def generate(checkpoint: Path, *words: str) -> int:
    return main(["generate", str(checkpoint), "--tokenizer", "byte", "--max-new-tokens", "6", *words])


def as_json(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_prompt_and_continuation_are_told_apart(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(checkpoint, *PROMPTS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["--- prompt 1 of 2, 8 tokens", "Paris is"]
    assert lines[2].startswith("--- continuation, ")
    assert "--- prompt 2 of 2, 3 tokens" in lines
    assert generate(checkpoint, *PROMPTS, "--json") == 0
    for text in as_json(capsys):
        assert len(text["token_ids"]) == 6 or text["reason"] == "stop_id"


def test_a_hugging_face_folder_is_imported_for_a_moment(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert generate(checkpoint, *PROMPTS, "--json") == 0
    expected = as_json(capfd)
    assert generate(checkpoint.with_name("hf"), *PROMPTS, "--json") == 0
    output = capfd.readouterr()
    assert json.loads(output.out) == expected
    assert "note: importing" in output.err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_temporary_import_promises_nothing(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_source: Path, target: Path) -> None:
        with os_errors_as_cpt_errors(target):
            (target / SETTINGS_FILE).parent.mkdir()
            (target / SETTINGS_FILE).touch()
            raise OSError(errno.ENOSPC, "No space left on device", str(target / "0.distcp"))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary_checkpoint, "import_checkpoint", fail)
    assert generate(checkpoint.with_name("hf"), *PROMPTS) == 1
    error = capfd.readouterr().err
    assert "No space left on device" in error
    assert "run the same command again to resume" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_is_no_hugging_face_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("name: a\n")
    (tmp_path / "config.json").write_text("{}")
    assert generate(tmp_path, *PROMPTS) != 0
    assert "importing" not in capfd.readouterr().err


def test_samples_follow_the_seed_and_stop_texts_end_them(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def texts(*words: str) -> list[dict[str, Any]]:
        assert generate(checkpoint, *PROMPTS, "--temperature", "1.5", "--json", *words) == 0
        return as_json(capsys)

    first = texts("--seed", "1")
    assert texts("--seed", "1") == first
    assert texts("--seed", "2") != first
    readable = next(chr(token) for text in first for token in text["token_ids"] if 32 < token < 127)
    stopped = next(text for text in texts("--seed", "1", "--stop", readable) if text["reason"] == "stop_text")
    assert readable not in stopped["text"]
    assert stopped["token_ids"][-1] == ord(readable)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--prompt: give at least one text"),
        ((*PROMPTS, "--temperature", "-1"), "temperature: -1.0; give 0"),
        ((*PROMPTS, "--temperature", "inf"), "temperature: inf; give 0"),
        (("--prompt", "fine", "--prompt", "latin-1 \udce9"), "prompt 2: not valid UTF-8"),
        ((*PROMPTS, "--top-p", "0"), "--top-p: 0.0; give a probability"),
        ((*PROMPTS, "--top-k", "-3"), "--top-k: -3; give a number"),
        ((*PROMPTS, "--max-new-tokens", "0"), "--max-new-tokens: 0; give 1 or more"),
        ((*PROMPTS, "--top-k", "3"), "give a --temperature above 0"),
        ((*PROMPTS, "parallel.tensro=2"), "tensro"),
        ((*PROMPTS, "tokens=5"), "tokens=5: not possible here"),
        ((*PROMPTS, "parallel.tensor=2"), "one replica takes tensor 2"),
        ((*PROMPTS, "parallel.context=2"), "context 2"),
    ],
)
def test_mistakes_are_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert generate(checkpoint, *words) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_tokenizer_wants_one(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(checkpoint), *PROMPTS]) == 2
    assert "it names no tokenizer; give one with --tokenizer KIND:PATH" in capsys.readouterr().err


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "none", *PROMPTS) == 2
    assert generate(tmp_path, *PROMPTS) == 3
    assert "holds no checkpoint" in capsys.readouterr().err
