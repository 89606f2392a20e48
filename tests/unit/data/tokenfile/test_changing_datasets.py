"""Datasets that change while a command or a run reads them are refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.data import BlendCursor, DocumentOptions, Loader, PhaseBlend, TokenStream
from megatron_cpt.data.rewrite import merge, split
from megatron_cpt.data.tokenfile import documents as document_module
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.files import identity
from megatron_cpt.files.identity import ChangedFileError, FileIdentity


def replace(path: Path) -> None:
    """Replace a file by one of equal size, time and ends; of an index by its copy."""
    before, data = path.stat(), bytearray(path.read_bytes())
    if path.suffix == ".bin":
        data[200:208] = bytes(8)
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


@pytest.fixture
def dataset(make_dataset) -> IndexedDataset:
    """Forty documents of ten tokens each."""
    return make_dataset("web", [range(10 * number, 10 * number + 10) for number in range(40)])


def left(folder: Path) -> set[str]:
    return set(os.listdir(folder)) - {"web.bin", "web.idx"}


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("command", ["merge", "split", "overlap"])
def test_an_input_that_is_replaced_is_named_and_nothing_is_published(
    dataset, tmp_path, monkeypatch, capsys, command, ending
):
    real = {"merge": merge._copy_table, "blocks": document_module.document_blocks}

    def copy_table(*arguments):
        replace(tmp_path / f"web.{ending}")
        monkeypatch.setattr(merge, "_copy_table", real["merge"])
        real["merge"](*arguments)

    def blocks(*arguments):
        for number, block in enumerate(real["blocks"](*arguments, block_tokens=50)):
            if number == 1:
                replace(tmp_path / f"web.{ending}")
            yield block

    from megatron_cpt.data.contamination import overlap

    monkeypatch.setattr(merge, "_copy_table", copy_table)
    monkeypatch.setattr(split, "document_blocks", blocks)
    monkeypatch.setattr(overlap, "document_blocks", blocks)
    prefix, out = str(tmp_path / "web"), str(tmp_path / "out")
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "held out"}))
    held_out = str(tmp_path / "held.jsonl")
    arguments = {
        "merge": f"merge --input {prefix} --output-prefix {out}",
        "split": f"split --input {prefix} --held-out-prefix {out} --rest-prefix {out}-rest --fraction 0.5",
        "overlap": f"overlap --train {prefix} --held-out {held_out} --tokenizer byte --clean-prefix {out}",
    }[command].split()
    assert main(arguments) == 3
    assert f"web.{ending}: was replaced by another file" in capsys.readouterr().err
    assert left(tmp_path) == {"held.jsonl"}
    monkeypatch.undo()
    assert main(arguments) == 0


def test_held_out_text_that_changes(dataset, tmp_path, monkeypatch, capsys):
    path = tmp_path / "held.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    from megatron_cpt.data.contamination import held_out

    real = held_out.orjson.loads

    class Changing:
        JSONDecodeError = held_out.orjson.JSONDecodeError

        @staticmethod
        def loads(raw):
            path.write_text('{"text": "one"}\n{"text": "2"}\n')
            return real(raw)

    monkeypatch.setattr(held_out, "orjson", Changing)
    command = ["overlap", "--train", str(tmp_path / "web"), "--held-out", str(path), "--tokenizer", "byte"]
    assert main(command) == 3
    assert "held.jsonl: was truncated" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["replace", "write", "remove"])
@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_training_file_that_changes_ends_the_loader(dataset, tmp_path, ending, change):
    stream = TokenStream("web", [dataset], seq_length=8, seed=1)
    cursor = BlendCursor([PhaseBlend("p", 0, 400, {"web": 1.0})], ["web"])
    documents = DocumentOptions(reset_attention=True)  # without an end-of-document id the .idx is read, too
    with Loader([stream], cursor, global_batch=4, micro_batch=2, prefetch=1, documents=documents) as loader:
        loader.next_step()
        path = tmp_path / f"web.{ending}"
        if change == "replace":
            replace(path)
            problem = "was replaced by another file"
        elif change == "write":
            os.utime(path)
            problem = "was written to"
        else:
            path.unlink()
            problem = "No such file"
        with pytest.raises((ChangedFileError, FileNotFoundError), match=problem) as caught:
            list(loader)
        assert f"web.{ending}" in str(caught.value)


def test_a_fuse_mount_may_give_a_file_another_inode(dataset, tmp_path, monkeypatch):
    before = FileIdentity.read(tmp_path / "web.bin")
    device = os.stat(tmp_path).st_dev
    table = tmp_path / "mountinfo"
    table.write_text(f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw shared:1 - fuse.gcsfuse bucket rw\n")
    monkeypatch.setattr(identity, "_MOUNTS", str(table))
    identity._has_lasting_inodes.cache_clear()
    try:
        replace(tmp_path / "web.bin")
        before.check()
        assert np.array_equal(dataset.read(0, 10), np.arange(10))
        os.utime(tmp_path / "web.bin")
        with pytest.raises(ChangedFileError, match="was written to"):
            before.check()
    finally:
        identity._has_lasting_inodes.cache_clear()
