"""Input that changes while it is read is refused by name; a mixture of two versions is never published."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_cpt.cli import main
from megatron_cpt.data.preprocess import preprocess_run
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.preprocess.join import join_shards
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.errors import UserError
from megatron_cpt.files.identity import ChangedFileError

SMALL = 20_000  # bytes per block


def write(path: Path, word: str) -> None:
    """Write 1,000 documents that do not pack well, so that packed files have several blocks, too."""
    rng = random.Random(word)
    texts = [f"{word} {number} {rng.randbytes(300).hex()}" for number in range(1000)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=50)
        return
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(packers.get(path.suffix, bytes)(data))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    """Replace a file by another one of its size and time."""
    before, other = path.stat(), path.with_name(f"other{path.suffix}")
    write(other, "newer")
    os.truncate(other, before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def overwrite(path: Path) -> None:
    write(path, "newer")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "one more"}\n')


CHANGES = {"truncate": truncate, "replace": replace, "overwrite": overwrite, "append": append}


def when_blocks_are_written(monkeypatch: pytest.MonkeyPatch, change, count: int = 1) -> None:
    """Call `change` once, when so many blocks are written and others are not read yet."""
    real, calls = preprocess_run._Run._write, []

    def write_and_change(self, result) -> None:
        real(self, result)
        calls.append(result)
        if len(calls) == count:
            change()

    monkeypatch.setattr(preprocess_run._Run, "_write", write_and_change)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_changes_is_named_and_nothing_is_published(tmp_path, monkeypatch, capsys, ending, change):
    path = tmp_path / f"web{ending}"
    write(path, "older")
    when_blocks_are_written(monkeypatch, lambda: CHANGES[change](path))
    monkeypatch.setattr("megatron_cpt.data.preprocess.inputs.BLOCK_BYTES", SMALL)
    options = PreprocessOptions(block_bytes=SMALL, allow_damaged_input=True, max_bad="100%")
    with pytest.raises(ChangedFileError, match=rf"web\{ending}: was .* since it was opened") as caught:
        preprocess([path], tmp_path / "p", tokenizer="byte", options=options)
    assert caught.value.exit_status == 3
    assert os.listdir(tmp_path) == [path.name]  # no work either: no later call has this input
    monkeypatch.undo()
    write(path, "older")
    arguments = ["preprocess", "--input", str(path), "--output-prefix", str(tmp_path / "p"), "--tokenizer", "byte"]
    assert main(arguments) == 0
    assert "1,000 documents" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_what_looks_damaged_because_it_was_cut_is_named_as_changed(tmp_path, monkeypatch, workers):
    path = tmp_path / "web.jsonl.zst"
    write(path, "older")
    when_blocks_are_written(monkeypatch, lambda: truncate(path))
    with pytest.raises(ChangedFileError, match=r"web\.jsonl\.zst: was truncated"):
        preprocess(
            [path], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(block_bytes=SMALL, workers=workers)
        )
    assert os.listdir(tmp_path) == [path.name]


def test_an_earlier_file_that_changes_before_the_result_is_published(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, "older")

    def make_pairs(*arguments):
        replace(tmp_path / "a.jsonl")
        return real(*arguments)

    from megatron_cpt.data.preprocess import pipeline

    real = pipeline.make_pairs
    monkeypatch.setattr(pipeline, "make_pairs", make_pairs)
    with pytest.raises(ChangedFileError, match=r"a\.jsonl: was replaced by another file"):
        preprocess([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "p", tokenizer="byte")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.jsonl"]


def test_a_shard_whose_input_changes_is_not_finished(tmp_path, monkeypatch):
    path = tmp_path / "web.jsonl"
    write(path, "older")
    when_blocks_are_written(monkeypatch, lambda: replace(path))
    options = PreprocessOptions(block_bytes=SMALL, shard=Shard(0, 1))
    with pytest.raises(ChangedFileError, match=r"web\.jsonl: was replaced"):
        preprocess([path], tmp_path / "p", tokenizer="byte", options=options)
    with pytest.raises(UserError, match="missing or not finished"):
        join_shards(tmp_path / "p", 1)


def test_input_that_changed_since_an_interrupted_run_is_named(tmp_path, monkeypatch):
    path = tmp_path / "web.jsonl"
    write(path, "older")

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess_run, "SAVE_SECONDS", -1)
    when_blocks_are_written(monkeypatch, stop, count=2)
    options = PreprocessOptions(block_bytes=SMALL)
    with pytest.raises(KeyboardInterrupt):
        preprocess([path], tmp_path / "p", tokenizer="byte", options=options)
    monkeypatch.undo()
    overwrite(path)
    with pytest.raises(UserError, match=r"input .*web\.jsonl: changed since the run in .*p\.preprocess was inter"):
        preprocess([path], tmp_path / "p", tokenizer="byte", options=options)
