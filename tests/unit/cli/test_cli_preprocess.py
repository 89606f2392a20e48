"""`megatron-cpt preprocess`: the options reach the encoder, and the summary is printed."""

from __future__ import annotations

import json

import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.tokenfile.reader import IndexedDataset


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, lines in {"a": ["one", "two"], "b": ["three"]}.items():
        rows = [json.dumps({"text": line, "body": line.upper()}) for line in lines]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def documents(prefix) -> list[list[int]]:
    data = IndexedDataset(prefix)
    return [data.document(number).tolist() for number in range(data.num_documents)]


def test_several_inputs_after_one_flag(texts, capsys):
    arguments = ["--output-prefix", "out/x", "--tokenizer", "byte", "--append-eod"]
    assert main(["preprocess", "--input", "a.jsonl", "b.jsonl", *arguments]) == 0
    assert documents("out/x") == [[*text.encode(), 256] for text in ("one", "two", "three")]
    captured = capsys.readouterr()
    assert "out/x: 3 documents, 14 uint16 tokens" in captured.out
    assert captured.err == ""


def test_another_key_no_end_and_bad_lines(texts, capsys):
    (texts / "b.jsonl").write_text('{"body": "YES"}\nno json\n{"body": ""}\n')
    assert (
        main(["preprocess", "--input", "b.jsonl", "--output-prefix", "x", "--tokenizer", "byte", "--key", "body"]) == 0
    )
    assert documents("x") == [list(b"YES")]
    out = capsys.readouterr().out
    assert "skipped: 1 empty documents" in out
    assert "skipped: 1 bad lines, listed in x.bad.jsonl" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--input", "none.jsonl", "--tokenizer", "byte"], "none.jsonl"),
        (["--input", "a.jsonl", "--tokenizer", "nope:x"], "not a known KIND:PATH"),
        (["--input", "a.jsonl", "--tokenizer", "byte", "--workers", "0"], "Invalid value for '--workers'"),
    ],
)
def test_mistakes(texts, capsys, arguments, text):
    assert main(["preprocess", *arguments, "--output-prefix", "x"]) == 2
    assert text in capsys.readouterr().err
    assert not list(texts.glob("x*"))


def test_shards_are_joined_to_the_same_bytes(texts, capsys):
    common = ["--tokenizer", "byte", "--append-eod", "--shuffle", "7"]
    assert main(["preprocess", "--input", "a.jsonl", "b.jsonl", "--output-prefix", "one", *common]) == 0
    for shard in ("0/2", "1/2"):
        arguments = ["--input", "a.jsonl", "b.jsonl", "--output-prefix", "two", "--shard", shard]
        assert main(["preprocess", *arguments, *common]) == 0
    assert "shard 1 of 2 is ready" in capsys.readouterr().out
    assert main(["preprocess", "--join", "2", "--output-prefix", "two"]) == 0
    for end in ("bin", "idx"):
        assert (texts / f"one.{end}").read_bytes() == (texts / f"two.{end}").read_bytes()


def test_too_many_bad_lines_are_refused(texts, capsys):
    (texts / "b.jsonl").write_text('{"text": "good"}\n{"text": null}\n')
    arguments = ["preprocess", "--input", "b.jsonl", "--output-prefix", "x", "--tokenizer", "byte", "--max-bad"]
    assert main([*arguments, "0.1%"]) == 3
    assert "b.jsonl:2: the value of 'text' is not a string" in capsys.readouterr().err
    assert not list(texts.glob("x*"))
    assert main([*arguments, "50%"]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tokenizer", "byte"], "--input"),
        (["--input", "a.jsonl"], "--tokenizer"),
        (["--join", "2", "--input", "a.jsonl"], "do not combine it with --input, --tokenizer or --shard"),
        (["--join", "2"], "x.preprocess-0-of-2"),
        (["--input", "a.jsonl", "--tokenizer", "byte", "--shard", "2/2"], "the last one of 2 is 1/2"),
        (["--input", "a.jsonl", "--tokenizer", "byte", "--split-tokens", "few"], "not a count"),
        (
            ["--input", "a.jsonl", "--tokenizer", "byte", "--fast-tokenizer", "on"],
            "does not support this kind",
        ),
    ],
)
def test_mistakes_with_parts(texts, capsys, arguments, text):
    assert main(["preprocess", *arguments, "--output-prefix", "x"]) == 2
    assert text in capsys.readouterr().err
    assert not list(texts.glob("x*"))


@pytest.mark.parametrize("prefix", ["io/", "io/.", ""])
@pytest.mark.parametrize("options", [[], ["--key", "text", "body"], ["--split-tokens", "2"], ["--shard", "0/2"]])
def test_a_prefix_without_a_file_name_is_refused_because_its_files_would_be_hidden(texts, capsys, prefix, options):
    arguments = ["--input", "a.jsonl", "--tokenizer", "byte", "--output-prefix", prefix, *options]
    assert main(["preprocess", *arguments]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert f"output prefix {prefix!r}: has no file name" in message
    assert main(["preprocess", "--join", "2", "--output-prefix", prefix]) == 2
    assert sorted(path.name for path in texts.iterdir()) == ["a.jsonl", "b.jsonl"]
