"""`megatron-cpt preprocess`: the options reach the encoder, and what happened is said."""

from __future__ import annotations

import json

import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.indexed import IndexedDataset


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
    assert "left out: 1 empty documents" in out
    assert "left out: 1 bad lines, listed in x.bad.jsonl" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--input", "none.jsonl", "--tokenizer", "byte"], "none.jsonl"),
        (["--input", "a.jsonl", "--tokenizer", "nope:x"], "not a KIND:PATH that is known"),
        (["--input", "a.jsonl", "--tokenizer", "byte", "--workers", "0"], "Invalid value for '--workers'"),
    ],
)
def test_mistakes(texts, capsys, arguments, text):
    assert main(["preprocess", *arguments, "--output-prefix", "x"]) == 2
    assert text in capsys.readouterr().err
    assert not list(texts.glob("x*"))
