"""A run knows its data: tokenizer, end of documents and content are compared at the start and on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, small_run, train_here

IDS = " ".join(str(number % 256) for number in range(3000))


def encode(folder: Path, tokenizer: str) -> None:
    """Write the sources of the small run with sidecars that name a tokenizer of 257 ids."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": IDS}) + "\n" for _ in range(3)))
    options = PreprocessOptions(append_eod=True, overwrite=True)
    for name in ("web", "code", "qa"):
        preprocess([folder / "a.jsonl"], folder / "data" / name, tokenizer=tokenizer, options=options)


@pytest.fixture(scope="module")
def run_of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run.yaml of a run on the byte tokenizer's data that has saved a checkpoint after step 2."""
    folder = tmp_path_factory.mktemp("bytes")
    run = small_run(folder, tokenizer="byte")
    encode(folder, "byte")
    assert run_ranks(1, train_here, str(run), ["stop_at_step=2", "resilience.verify_data=true"]) == [0]
    return run


def test_a_checkpoint_of_another_tokenizer_is_refused(run_of_bytes: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path, tokenizer="null:257", init={"from": str(newest(run_of_bytes.parent / "out"))})
    encode(tmp_path, "null:257")
    with pytest.raises(RankError, match=r"trained with tokenizer byte, this run has null:257.*--allow tokenizer"):
        run_ranks(1, train_here, str(run), ["stop_at_step=1"])
    assert not list(tmp_path.glob("out/checkpoints/*"))
    assert run_ranks(1, train_here, str(run), ["stop_at_step=1"], ["tokenizer"]) == [0]


def test_an_imported_checkpoint_is_known_by_its_files(run_of_bytes: Path, tmp_path: Path) -> None:
    from megatron_cpt.checkpoint.record import read_saved_run
    from megatron_cpt.errors import RefusedError
    from megatron_cpt.train.resume import compare_tokenizer

    origin = read_saved_run(newest(run_of_bytes.parent / "out"))
    compare_tokenizer(origin, ("byte", "byte"))
    compare_tokenizer(origin, None)
    origin.state.pop("tokenizer_fingerprint")
    compare_tokenizer(origin, ("byte", "byte"))  # unknown
    (origin.path / "hf").mkdir()
    (origin.path / "hf" / "tokenizer.json").write_text("{}")
    with pytest.raises(RefusedError, match=r"trained with tokenizer huggingface:.*tokenizer\.json"):
        compare_tokenizer(origin, ("byte", "byte"))
    (origin.path / "hf" / "tokenizer.json").unlink()
    (origin.path / "hf").rmdir()


def test_another_end_of_documents_is_refused_on_resume(run_of_bytes: Path) -> None:
    changes = ["stop_at_step=3", "documents.eod_id=0", "tokenizer=null"]
    with pytest.raises(RankError, match=r"end-of-document id 256 -> 0"):
        run_ranks(1, train_here, str(run_of_bytes), changes)


def test_damaged_content_is_found_on_request(run_of_bytes: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path, tokenizer="byte")
    encode(tmp_path, "byte")
    with open(tmp_path / "data" / "web.bin", "r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 4 * 2)
        file.write(bytes(8))
    with pytest.raises(RankError, match=r"data/web\.bin: its content has the checksum .*web\.json says"):
        run_ranks(2, train_here, str(run), ["stop_at_step=1", "resilience.verify_data=true"])


def test_a_file_replaced_between_save_and_resume_by_one_with_equal_ends_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path, tokenizer="byte")
    encode(tmp_path, "byte")
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": IDS}) + "\n" for _ in range(60)))
    options = PreprocessOptions(append_eod=True, overwrite=True)
    preprocess([tmp_path / "long.jsonl"], tmp_path / "data" / "web", tokenizer="byte", options=options)
    assert run_ranks(1, train_here, str(run), ["stop_at_step=1"]) == [0]
    path = tmp_path / "data" / "web.bin"
    content = path.read_bytes()
    place = len(content) * 10 // 65 + 8192  # between two blocks of the fingerprint
    path.write_bytes(content[:place] + bytes(8) + content[place + 8 :])
    with pytest.raises(RankError, match=r"data/web\.bin: its content has the checksum .*web\.json says"):
        run_ranks(1, train_here, str(run), ["stop_at_step=2"])
    path.write_bytes(content)  # another time, the same content
    assert run_ranks(1, train_here, str(run), ["stop_at_step=2"]) == [0]
