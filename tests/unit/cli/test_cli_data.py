"""Output and exit status of the data commands `check`, `inspect`, `merge`, `split`, `overlap` and their scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.cli.commands.data.overlap_command import overlap
from megatron_cpt.data.contamination.overlap import NEAR, NGRAM
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter

TEXTS = ["the quick brown fox jumps over the lazy dog", "to be or not to be", "to be or not to be"]


def write(prefix: str, texts: list[str]) -> None:
    with IndexedDatasetWriter(prefix, "<u2") as writer:
        for text in texts:
            writer.add_document(np.array([*text.encode(), 256]))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("web", TEXTS)
    write("code", ["def f(): pass", "x = 1"])
    return tmp_path


class TestCheck:
    def test_valid(self, folder, capsys):
        assert main(["check", "web", "code.idx", "--vocab-size", "257"]) == 0
        out = capsys.readouterr().out
        assert "web: valid\n  3 documents, 82 uint16 tokens\n" in out
        assert "largest id 256, of a vocabulary of 257" in out
        assert "end-of-document id: unknown (100.0% of the documents end with id 256); empty: 0; duplicates: 1" in out
        assert "warning: web.bin: document 2: is a duplicate of document 1" in out
        assert "code: valid" in out

    def test_invalid(self, folder, capsys):
        os.truncate("code.bin", 10)
        assert main(["check", "*", "--vocab-size", "200"]) == 3
        out = capsys.readouterr().out
        assert "code: INVALID" in out
        assert "fault: code.bin: has 10 bytes, but the sizes in its .idx add up to 20 uint16 tokens" in out
        assert "web: INVALID, 3 faults" in out
        assert "fault: web.bin: token 43 of document 0: id 256 is outside of the vocabulary of 200" in out

    @pytest.mark.parametrize(("num_bytes", "status"), [(40, 0), (39, 3)])
    def test_json(self, folder, capsys, num_bytes, status):
        os.truncate("code.bin", num_bytes)
        assert main(["check", "web", "code", "--vocab-size", "300", "--json"]) == status
        captured = capsys.readouterr()
        plain = json.loads(captured.out)
        assert plain["sound"] == (status == 0)
        web, code = plain["data_sets"]
        assert (web["prefix"], web["sound"], web["documents"], web["tokens"]) == ("web", True, 3, 82)
        assert (web["ids"]["max_id"], web["ids"]["num_outside"], web["duplicate_documents"]) == (256, 0, 1)
        assert code["sound"] == plain["sound"]
        if status:
            faults = {(one["level"], one["kind"], one["file"], one["value"]) for one in code["findings"]}
            assert ("fault", "bin_length", "code.bin", 39) in faults
            assert all(one["message"].startswith("code.") for one in code["findings"])

    def test_with_a_sidecar(self, folder, capsys):
        Path("a.jsonl").write_text('{"text": "abc."}\n{"text": "d."}\n')
        made = ["preprocess", "--input", "a.jsonl", "--output-prefix", "a", "--tokenizer", "byte", "--workers", "1"]
        assert main([*made, "--append-eod"]) == 0
        capsys.readouterr()
        assert main(["check", "a", "--tokenizer", "byte"]) == 0
        out = capsys.readouterr().out
        assert "end-of-document id: 256; empty: 0" in out
        assert "tokenizer byte; content verified by a.json" in out
        assert main(["check", "a", "--tokenizer", "null:257", "--seq-length", "8"]) == 3
        out = capsys.readouterr().out
        assert "fault: a.bin: its ids are of tokenizer byte, not of null:257" in out
        assert "warning: a.bin: 8 tokens are too few for a sample of 9" in out

    def test_no_such_file(self, folder, capsys):
        assert main(["check", "none"]) == 2
        assert "no such file: none.idx and none.bin" in capsys.readouterr().err
        assert main(["check", "none-*", "--json"]) == 2
        assert main(["check", "web", "--vocab-size", "0"]) == 2
        assert main(["check"]) == 2


class TestInspect:
    def test_counts_and_histogram(self, folder, capsys):
        assert main(["inspect", "web", "--plot", "lengths.png"]) == 0
        out = capsys.readouterr().out
        assert "web: 3 documents, 82 uint16 tokens" in out
        assert "tokens per document: 19 to 44, mean 27.3" in out
        assert [line.split()[:4] for line in out.splitlines()[-2:]] == [
            ["16", "to", "31", "2"],
            ["32", "to", "63", "1"],
        ]
        assert Path("lengths.png").stat().st_size > 1000

    def test_documents(self, folder, capsys):
        assert main(["inspect", "web", "--document", "1", "--tokenizer", "byte"]) == 0
        out = capsys.readouterr().out
        assert "document 1: tokens 44 to 63 of the file, 19 tokens" in out
        assert TEXTS[1] in out
        assert main(["inspect", "code", "--tokenizer", "byte"]) == 0
        assert "def f(): pass" in capsys.readouterr().out

    def test_json(self, folder, capsys):
        assert main(["inspect", "web", "--json", "--tokenizer", "byte"]) == 0
        plain = json.loads(capsys.readouterr().out)
        assert (plain["documents"], plain["tokens"], plain["percentiles"]["p50"]) == (3, 82, 19)
        assert plain["histogram"][0] == {"low": 16, "high": 31, "documents": 2, "tokens": 38}
        assert [one["text"] for one in plain["first_documents"]] == TEXTS
        assert main(["inspect", "web", "--json", "--document", "2"]) == 0
        plain = json.loads(capsys.readouterr().out)
        assert plain == {"document": 2, "first_token": 63, "num_tokens": 19, "ids": [*TEXTS[2].encode(), 256]}

    @pytest.mark.parametrize(
        ("arguments", "status", "text"),
        [
            (["none"], 2, "no such file"),
            (["web", "--document", "3"], 2, "no document 3; they are 0 to 2"),
            (["*"], 2, "2 datasets; give one of them: code, web"),
            (["web", "--tokenizer", "nope"], 2, "not a known KIND:PATH"),
            (["wide", "--tokenizer", "byte"], 2, "id 300 is not one of the tokenizer's 257 ids"),
            (["negative", "--tokenizer", "byte"], 2, "id -7 is not one of the tokenizer's 257 ids"),
            (["cut"], 3, "cut.bin: has 2 bytes"),
        ],
    )
    def test_mistakes(self, folder, capsys, arguments, status, text):
        if arguments[0] != "*":
            write("cut", ["ab"])
            os.truncate("cut.bin", 2)
            for name, foreign in (("wide", 300), ("negative", -7)):
                with IndexedDatasetWriter(name, "<i4") as writer:
                    writer.add_document(np.array([65, foreign]))
        assert main(["inspect", *arguments]) == status
        assert text in capsys.readouterr().err


def test_no_data_command_loads_torch(folder):
    script = (
        "import sys; from megatron_cpt.cli import main; import megatron_cpt.provenance.trace\n"
        "print(main(['check', 'web']), main(['inspect', 'web']), main(['trace', 'none', '--step', '1']))\n"
        "print(main('merge --input web code --output-prefix out'.split()), end=' ')\n"
        "print(main('overlap --train web --held-out code'.split()))\n"
        "print([name for name in ('torch', 'megatron.core', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "0 0 2" in lines
    assert lines[-2:] == ["0", "[]"]


def tool(repository: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(repository / "tools" / f"{name}.py"), *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(repository)},
    )  # fmt: skip


def test_merge_a_folder_as_megatron_does(folder, repository):
    Path("all").mkdir()
    for name in ("web", "code"):
        for ending in (".bin", ".idx"):
            os.rename(f"{name}{ending}", f"all/{name}{ending}")
    done = tool(repository, "merge_datasets", "--input", "all", "--output-prefix", "joined")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "joined: 2 datasets, 5 documents, 102 uint16 tokens\n"
    assert bytes(IndexedDataset("joined").document(0)[:-1].astype("u1")) == b"def f(): pass"
    again = tool(repository, "merge_datasets", "--input", "all", "--output-prefix", "joined")
    assert again.returncode == 2
    assert "error: joined.bin and joined.idx: exists already" in again.stderr
    other = tool(repository, "merge_datasets", "--input", "all/web", "all/code", "--output-prefix", "other")
    assert other.returncode == 0
    assert bytes(IndexedDataset("other").document(3)[:-1].astype("u1")) == b"def f(): pass"


def test_split(folder, repository):
    arguments = ("--input", "web", "code", "--fraction", "0.5", "--held-out-prefix", "held", "--rest-prefix", "rest")
    done = tool(repository, "split_dataset", *arguments)
    assert done.returncode == 0, done.stderr
    held, rest = IndexedDataset("held"), IndexedDataset("rest")
    assert (held.num_documents + rest.num_documents, held.num_tokens + rest.num_tokens) == (5, 102)
    assert f"held: {held.num_documents} documents, {held.num_tokens} tokens" in done.stdout
    assert tool(repository, "split_dataset", *arguments).returncode == 2


def test_contamination(folder, repository):
    exam = ("he quick brown fox jumps over", TEXTS[1], "something unrelated")
    Path("exam.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in exam))
    arguments = ("--train", "web", "code", "--held-out", "exam.jsonl", "--tokenizer", "byte")
    done = tool(repository, "contamination", *arguments, "--clean-prefix", "clean")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        "3 held-out documents: 1 exact, 1 near, 0 partial, 1 clean, 0 short (n-grams of 13 ids)"
    )
    assert "3 of 5 training documents (102 tokens) overlap with them" in done.stdout
    assert "exact   exam.jsonl:2:text: 6 of 6 n-grams in web document 1, 6 in all documents" in done.stdout
    assert IndexedDataset("clean").num_documents == 2
    plain = json.loads(tool(repository, "contamination", *arguments, "--json").stdout)
    assert plain["counts"] == {"exact": 1, "near": 1, "partial": 0, "clean": 1, "short": 0}
    assert plain["held_out"][1]["copies"] == 2
    bad = tool(repository, "contamination", "--train", "none", "--held-out", "web")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "error: no such file" in bad.stderr


@pytest.fixture
def damaged(folder) -> None:
    """Write a dataset whose .bin was truncated, and one of another token type."""
    write("cut", ["ab"])
    os.truncate("cut.bin", 2)
    with IndexedDatasetWriter("wide", "<i4") as writer:
        writer.add_document(np.array([65, 300]))


class TestMerge:
    def test_text_and_json(self, folder, capsys):
        assert main(["merge", "--input", "web", "code", "--output-prefix", "out/joined"]) == 0
        assert capsys.readouterr().out == "out/joined: 2 datasets, 5 documents, 102 uint16 tokens\n"
        assert main(["merge", "--input", "*", "--output-prefix", "again", "--json"]) == 0
        plain = json.loads(capsys.readouterr().out)
        assert plain == {
            "prefix": "again", "inputs": ["code", "web"], "documents": 5, "tokens": 102, "dtype": "uint16"
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("arguments", "status", "text"),
        [
            (["--input", "web", "none", "--output-prefix", "out"], 2, "no such file: none.idx and none.bin"),
            (["--input", "web", "wide", "--output-prefix", "out"], 2, "wide: has int32 tokens, web has uint16"),
            (["--input", "web", "--output-prefix", "code"], 2, "code.bin and code.idx: exists already"),
            (["--input", "--output-prefix", "out"], 2, "--input: give at least one value"),
            (["--input", "web"], 2, "--output-prefix"),
            (["--input", "web", "cut", "--output-prefix", "out"], 3, "cut.bin: has 2 bytes"),
        ],
    )
    def test_mistakes(self, folder, damaged, capsys, arguments, status, text):
        assert main(["merge", *arguments]) == status
        assert text in capsys.readouterr().err
        assert not list(folder.glob("out*"))


class TestSplit:
    def test_text_and_json(self, folder, capsys):
        arguments = ["split", "--input", "web", "code", "--fraction", "0.5", "--held-out-prefix", "held"]
        assert main(arguments) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith("held: ")
        assert second.startswith("the rest (not written): ")
        assert main([*arguments, "--rest-prefix", "rest", "--overwrite", "--json"]) == 0
        plain = json.loads(capsys.readouterr().out)
        for side, name in (("held_out", "held"), ("rest", "rest")):
            dataset = IndexedDataset(name)
            assert plain[side] == {"prefix": name, "documents": dataset.num_documents, "tokens": dataset.num_tokens}

    @pytest.mark.parametrize(
        ("changes", "status", "text"),
        [
            ({"--fraction": "1"}, 2, "fraction: 1.0: give a share"),
            ({"--seed": str(2**63)}, 2, "give a signed integer of 64 bits"),
            ({"--held-out-prefix": "web"}, 2, "web: is an input too"),
            ({"--rest-prefix": "./out"}, 2, "out: is given for both outputs"),
            ({"--rest-prefix": ""}, 2, "output prefix '': has no file name"),
            ({"--held-out-prefix": "io/."}, 2, "output prefix 'io/.': has no file name"),
            ({"--held-out-prefix": "code"}, 2, "code.bin and code.idx: exists already"),
            ({"--input": "none"}, 2, "no such file"),
            ({"--input": "cut"}, 3, "cut.bin: has 2 bytes"),
        ],
    )
    def test_mistakes(self, folder, damaged, capsys, changes, status, text):
        options = {"--input": "web", "--fraction": "0.5", "--held-out-prefix": "out"} | changes
        assert main(["split", *(word for pair in options.items() for word in pair)]) == status
        assert text in capsys.readouterr().err
        assert not list(folder.glob("out*"))

    @pytest.mark.parametrize("command", ["split", "merge"])
    def test_a_full_disk_is_one_message(self, folder, command):
        """Allow files of 20 bytes, as a disk that fills up would, in a process of its own."""
        code = (
            "import resource, signal, sys; from megatron_cpt.cli import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\nsys.exit(main(sys.argv[1:]))"
        )
        outputs = {"split": ["--fraction", "0.5", "--held-out-prefix", "out"], "merge": ["--output-prefix", "out"]}
        arguments = [command, "--input", "web", *outputs[command]]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert re.fullmatch(r"megatron-cpt: error: out\.bin\.tmp-\d+: File too large\n", done.stderr)
        assert not list(folder.glob("out*"))


class TestOverlap:
    def test_clean_training_data(self, folder, capsys):
        write("exam", [TEXTS[1]])
        arguments = ["overlap", "--train", "web", "code", "--held-out", "exam"]
        assert main([*arguments, "--clean-prefix", "clean"]) == 0
        assert "1 exact, 0 near, 0 partial, 0 clean, 0 short (n-grams of 13 ids)" in capsys.readouterr().out
        assert IndexedDataset("clean").num_documents == 3
        assert main([*arguments, "--json", "--ngram", "40"]) == 0
        plain = json.loads(capsys.readouterr().out)
        assert (plain["ngram"], plain["near"], plain["held_out"][0]["copies"]) == (40, 0.8, 2)

    def test_defaults_are_those_of_the_library(self):
        defaults = {name: parameter.default for name, parameter in signature(overlap).parameters.items()}
        assert (defaults["ngram"], defaults["near"]) == (NGRAM, NEAR)

    @pytest.mark.parametrize(
        ("changes", "status", "text"),
        [
            ({"--train": "none"}, 2, "no such file"),
            ({"--held-out": "exam.jsonl"}, 2, "exam.jsonl: text needs the tokenizer of the training data"),
            ({"--ngram": "0"}, 2, "ngram: 0"),
            ({"--clean-prefix": "web"}, 2, "web: is an input too"),
            ({"--clean-prefix": "./code", "--overwrite": None}, 2, "code: is an input too"),
            ({"--clean-prefix": "new/"}, 2, "output prefix 'new/': has no file name"),
            ({"--train": "cut"}, 3, "cut.bin: has 2 bytes"),
            ({"--held-out": "cut"}, 3, "cut.bin: has 2 bytes"),
        ],
    )
    def test_mistakes(self, folder, damaged, capsys, changes, status, text):
        options = {"--train": "web", "--held-out": "code", "--clean-prefix": "out"} | changes
        assert main(["overlap", *(word for pair in options.items() for word in pair if word is not None)]) == status
        assert text in capsys.readouterr().err
        assert not list(folder.glob("out*"))
