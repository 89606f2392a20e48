"""preprocess: exact documents in order, bad lines reported, and complete output or none."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.data.rewrite.merge import folder_prefixes
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter, expand_prefixes
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.errors import RefusedError, UserError

TEXTS = ["one", "zwei äöü", "三\n\u2028", "four " * 50]


def jsonl(texts) -> bytes:
    return b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))


def documents(prefix: Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), load_tokenizer("byte")
    return [tokenizer.decode(dataset.document(i)) for i in range(dataset.num_documents)]


def bad_lines(prefix: Path) -> list[tuple[str, int, str]]:
    lines = [json.loads(line) for line in Path(f"{prefix}.bad.jsonl").read_text().splitlines()]
    return [(Path(line["file"]).name, line["line"], line["reason"]) for line in lines]


PACKED = ("a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz")


def pack(name: str, data: bytes) -> bytes:
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if packer := packers.get(Path(name).suffix.lower()):
        return packer(data)
    # with a checksum, as the zstd program writes it
    return zstandard.ZstdCompressor(write_checksum=True).compress(data) if name.endswith(".zst") else data


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.ndjson", "a.JSONL", "a.jsonl.gz", "a.json.zst", "a.jsonl.BZ2", "a.jsonl.xz"]
)
def test_documents_and_report(tmp_path, name):
    (tmp_path / name).write_bytes(pack(name, jsonl(TEXTS)))
    report = preprocess([tmp_path / name], tmp_path / "out" / "web", tokenizer="byte")
    assert documents(tmp_path / "out" / "web") == TEXTS
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (report.documents, report.tokens, report.text_bytes) == (4, text_bytes, text_bytes)
    assert (report.empty_documents, report.bad_lines, report.bad_path) == (0, 0, None)
    assert report.input_bytes == (tmp_path / name).stat().st_size
    assert report.dtype == "uint16"
    assert sorted(os.listdir(tmp_path / "out")) == ["web.bin", "web.idx", "web.json"]


def test_append_eod(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["ab", "", "c"]))
    report = preprocess(
        [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(append_eod=True)
    )
    dataset = IndexedDataset(tmp_path / "p")
    assert [dataset.document(i).tolist() for i in range(2)] == [[97, 98, 256], [99, 256]]
    assert (report.tokens, report.empty_documents) == (5, 1)


def test_a_text_that_gives_no_token_is_empty(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a a", "  ", "a"]))
    spec = f"huggingface:{tmp_path}/tokenizer.json"
    report = preprocess(
        [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer=spec, options=PreprocessOptions(append_eod=True)
    )
    dataset = IndexedDataset(tmp_path / "p")
    assert [dataset.document(i).tolist() for i in range(2)] == [[0, 0, 1], [0, 1]]
    assert (report.documents, report.empty_documents, report.text_bytes) == (2, 1, 4)


def test_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}\n')
    preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(key="content"))
    assert documents(tmp_path / "p") == ["yes"]


def test_line_ends_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "one"}\r\n   \n\r\n{"text": "two"}')
    report = preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte")
    assert documents(tmp_path / "p") == ["one", "two"]
    assert report.bad_lines == 0


def test_files_in_order_and_globs(tmp_path):
    for name in ("b1.jsonl", "b2.jsonl.gz", "a.jsonl"):
        (tmp_path / name).write_bytes(pack(name, jsonl([f"{name} {i}" for i in range(3)])))
    preprocess([f"{tmp_path}/b*", tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte")
    expected = [f"{name} {i}" for name in ("b1.jsonl", "b2.jsonl.gz", "a.jsonl") for i in range(3)]
    assert documents(tmp_path / "p") == expected


def test_workers_write_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(32, 900, rng.integers(0, 4000)))) for _ in range(2500)]  # several blocks
    lines = jsonl(texts).splitlines(keepends=True)
    lines[1234] = b"{broken\n"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    seen: list[tuple[int, ...]] = []
    one = preprocess(
        [tmp_path / "a.jsonl"], tmp_path / "one", tokenizer="byte", options=PreprocessOptions(append_eod=True)
    )
    two = preprocess(
        [tmp_path / "a.jsonl"],
        tmp_path / "two",
        tokenizer="byte",
        options=PreprocessOptions(append_eod=True, workers=2, progress=lambda *now: seen.append(now)),
    )
    for ending in ("bin", "idx", "bad.jsonl"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()
    assert (two.documents, two.tokens, two.bad_lines) == (one.documents, one.tokens, 1)
    assert bad_lines(tmp_path / "two")[0][:2] == ("a.jsonl", 1235)
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert seen[-1] == (two.input_bytes, two.input_bytes, two.documents, two.tokens)


BAD = {
    b'{"text": "cut': "not JSON: unexpected end of data",
    b'{"text": "a"} {"text": "b"}': "not JSON: unexpected content",
    b'{"text": null}': "the value of 'text' is not a string, but NoneType",
    b'{"text": 5}': "the value of 'text' is not a string, but int",
    b'{"text": ["a"]}': "the value of 'text' is not a string, but list",
    b'{"title": "a", "body": "b"}': "has no key 'text'; it has 'title', 'body'",
    b"{}": "has no key 'text'; it has none",
    b'["text"]': "not an object, but a JSON list",
    b'"text"': "not an object, but a JSON str",
    b"17": "not an object, but a JSON int",
    b'{"text": "caf\xe9"}': "not UTF-8: invalid continuation byte at byte 13 of the line",
    b'{"text": "\\ud800"}': "not JSON: no low surrogate",
    b"\x00\x01\x02": "not JSON",
}


def test_bad_lines_are_named_and_the_rest_is_kept(tmp_path):
    lines = [line for bad in BAD for line in (bad, b'{"text": "good"}')]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    options = PreprocessOptions(max_bad="100%")
    report = preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=options)
    assert documents(tmp_path / "p") == ["good"] * len(BAD)
    assert (report.documents, report.bad_lines) == (len(BAD), len(BAD))
    assert report.bad_path == f"{tmp_path}/p.bad.jsonl"
    for (file, line, reason), (number, starts) in zip(bad_lines(tmp_path / "p"), enumerate(BAD.values()), strict=True):
        assert (file, line) == ("a.jsonl", 2 * number + 1)
        assert reason.startswith(starts)


def test_archives_of_several_members(tmp_path):
    for name in PACKED:
        (tmp_path / name).write_bytes(pack(name, jsonl(["one"])) + pack(name, b"") + pack(name, jsonl(["two"])))
    with (tmp_path / "a.jsonl.gz").open("ab") as file:
        file.write(bytes(512))  # gzip may be padded with zeros
    report = preprocess([tmp_path / name for name in PACKED], tmp_path / "p", tokenizer="byte")
    assert documents(tmp_path / "p") == ["one", "two"] * 4
    assert report.bad_lines == 0


def test_a_line_much_longer_than_a_block(tmp_path):
    long = "x" * 5_000_000
    (tmp_path / "a.jsonl").write_bytes(jsonl(["before", long, "after"]))
    preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte")
    assert [len(document) for document in documents(tmp_path / "p")] == [6, len(long), 5]


class TestAllOrNothing:
    def test_too_many_bad_lines(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{\n{\n{\n')
        with pytest.raises(RefusedError, match=r"more than 2 bad lines \(3 bad: .*a\.jsonl:2: not JSON"):
            preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(max_bad=2))
        assert os.listdir(tmp_path) == ["a.jsonl"]
        assert (
            preprocess(
                [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(max_bad=3)
            ).bad_lines
            == 3
        )

    def test_no_document_at_all(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b'{"txt": "a"}\n{"text": ""}\n')
        with pytest.raises(UserError, match=r"no document in .*: 1 empty, 1 bad: .*a\.jsonl:1: has no key 'text'"):
            preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte")
        assert os.listdir(tmp_path) == ["a.jsonl"]

    def test_does_not_overwrite(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(jsonl(["old"]) + b"{\n")
        preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte")
        (tmp_path / "a.jsonl").write_bytes(jsonl(["new"]))
        with pytest.raises(UserError, match=r"p\.bin and .*p\.idx: already exists"):
            preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte")
        assert documents(tmp_path / "p") == ["old"]
        preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer="byte", options=PreprocessOptions(overwrite=True))
        assert documents(tmp_path / "p") == ["new"]
        assert not (tmp_path / "p.bad.jsonl").exists()  # that list belonged to the old data

    def test_kill_leaves_no_pair_and_no_workers(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(jsonl(["text " * 100] * 20_000))
        script = tmp_path / "run.py"
        script.write_text(
            "import os, signal, sys\n"
            "from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess\n"
            "def progress(*now):\n"
            "    import multiprocessing\n"
            "    with open(sys.argv[2] + '.pids', 'w') as file:\n"
            "        print(*(child.pid for child in multiprocessing.active_children()), file=file)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "if __name__ == '__main__':\n"
            "    options = PreprocessOptions(workers=2, progress=progress)\n"
            "    preprocess([sys.argv[1]], sys.argv[2], tokenizer='byte', options=options)\n"
        )
        command = [sys.executable, str(script), str(tmp_path / "a.jsonl"), str(tmp_path / "p")]
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        done = subprocess.run(command, env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "p.bin").exists()
        assert not (tmp_path / "p.idx").exists()
        workers = [int(pid) for pid in (tmp_path / "p.pids").read_text().split()]
        assert workers
        deadline = time.monotonic() + 10
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestMistakes:
    @pytest.mark.parametrize(
        ("entry", "says"),
        [
            ("none.jsonl", "no such file"),
            ("none*.jsonl", "no such file"),
            ("folder", "a folder without a file that ends in"),
            ("a.doc", r"unknown ending; convert it to JSON Lines.*\(known endings are \.jsonl,"),
            ("a.zip", r"unknown ending; unzip -p .*a\.zip \| megatron-cpt preprocess --input -"),
        ],
    )
    def test_inputs(self, tmp_path, entry, says):
        (tmp_path / "folder").mkdir()
        (tmp_path / "a.doc").touch()
        (tmp_path / "a.zip").touch()
        with pytest.raises(UserError, match=says):
            preprocess([tmp_path / entry], tmp_path / "p", tokenizer="byte")

    def test_no_input(self, tmp_path):
        with pytest.raises(UserError, match="no input"):
            preprocess([], tmp_path / "p", tokenizer="byte")

    def test_tokenizer_without_an_end_of_document(self, tmp_path):
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
        spec = f"huggingface:{tmp_path}/tokenizer.json"
        with pytest.raises(UserError, match="no end-of-document id"):
            preprocess(
                [tmp_path / "a.jsonl"], tmp_path / "p", tokenizer=spec, options=PreprocessOptions(append_eod=True)
            )
        assert preprocess([tmp_path / "a.jsonl"], tmp_path / "p", tokenizer=spec).tokens == 1


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.jsonl.zst"])
def test_a_few_packed_bytes_do_not_fill_the_memory(tmp_path, name):
    """256 MiB of zeros in one line, packed into 260 KB (gzip) or 8 KB (Zstandard), between two documents."""
    line, zeros = b'{"text": "good"}\n', bytes(1 << 24)
    packer = zlib.compressobj(9, wbits=31) if name.endswith(".gz") else zstandard.ZstdCompressor(19).compressobj()
    pieces = [line, *[zeros] * 16, b"\n", line]
    packed = b"".join(map(packer.compress, pieces)) + packer.flush()
    assert len(packed) < 300_000
    (tmp_path / name).write_bytes(packed)
    code = (
        "import sys, resource\n"
        "from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "options = PreprocessOptions(max_line_bytes=1 << 22, max_bad=1)\n"
        "report = preprocess([sys.argv[1]], sys.argv[2], tokenizer='byte', options=options)\n"
        "print(report.documents, report.bad_lines, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / "p")]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    documents, bad, grown = map(int, output.split())
    assert (documents, bad) == (2, 1)
    assert grown < 120_000  # KiB


def test_killed_between_the_two_renames(tmp_path, monkeypatch):
    """No reader takes the `.bin` alone for a dataset, the old `.idx` is gone, and the next run does the rest."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(["new", "text"]))
    preprocess([tmp_path / "a.jsonl"], tmp_path / "whole", tokenizer="byte")
    prefix = tmp_path / "p"
    with IndexedDatasetWriter(prefix, "<u2") as writer:
        writer.add_document([1, 2, 3])

    def killed(source, target):
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        preprocess([tmp_path / "a.jsonl"], prefix, tokenizer="byte", options=PreprocessOptions(overwrite=True))
    monkeypatch.undo()
    assert Path(f"{prefix}.bin").read_bytes() == Path(tmp_path / "whole.bin").read_bytes()
    assert not Path(f"{prefix}.idx").exists()
    with pytest.raises(UserError, match=r"p\.idx"):
        IndexedDataset(prefix)
    with pytest.raises(UserError, match="no file matches"):
        expand_prefixes(f"{prefix}*")
    (tmp_path / "folder").mkdir()
    shutil.copy(f"{prefix}.bin", tmp_path / "folder")
    with pytest.raises(UserError, match=r"no such file: .*p\.idx"):
        folder_prefixes(tmp_path / "folder")
    report = preprocess([tmp_path / "a.jsonl"], prefix, tokenizer="byte")
    assert report.documents == 2
    for end in ("bin", "idx"):
        assert Path(f"{prefix}.{end}").read_bytes() == Path(tmp_path / f"whole.{end}").read_bytes()
    assert not Path(f"{prefix}.preprocess").exists()
