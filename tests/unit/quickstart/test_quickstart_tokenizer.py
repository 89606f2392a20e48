import os
from pydoc_data.topics import topics

import orjson
import pytest
import sentencepiece
import sources
import tokenizer


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "VOCABULARY_SIZE", 600)
    folder = tmp_path / "text" / "train"
    folder.mkdir(parents=True)
    real = list(topics.values())[:8]
    for name in [*sources.PRETRAINING, *sources.QUESTIONS]:
        rows = [{"text": "qqqq wwww zzzz " * 300}] if name in sources.QUESTIONS else [{"text": text} for text in real]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    (tmp_path / "corpora.json").write_text("{}")
    return tmp_path


def test_every_character_survives(data):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.train(data)))
    text = "def f(x):\n\n    return x  # 12345 \t\r\n ｆｕｌｌ é 漢字 \u0000 🙂  "
    assert model.vocab_size() == 600
    assert model.decode(model.encode(text)) == text


def test_question_data_have_no_say(data):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.train(data)))
    pieces = {model.id_to_piece(number) for number in range(model.vocab_size())}
    assert not [piece for piece in pieces if {"qq", "ww", "zz"} & {piece[i : i + 2] for i in range(len(piece))}]


def test_the_same_text_gives_the_same_tokenizer(data):
    first = tokenizer.train(data).read_bytes()
    tokenizer.train(data).unlink()
    assert tokenizer.train(data).read_bytes() == first


def test_trained_once_for_one_text(data):
    path = tokenizer.train(data)
    before = path.stat().st_mtime_ns
    assert tokenizer.train(data).stat().st_mtime_ns == before
    newer = before + 10**9
    os.utime(data / "corpora.json", ns=(newer, newer))
    tokenizer.train(data)
    assert path.stat().st_mtime_ns != before


def test_each_source_has_an_equal_part(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "CHARACTERS_PER_SOURCE", 100)
    for name in sources.PRETRAINING:
        rows = [{"text": f"{name[0]} 45678\n" * 2} for _ in range(50)]
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    lines = list(tokenizer.training_lines(tmp_path))
    # Two lines of 7 characters a document: the eighth document passes 100 characters.
    assert [line[0] for line in lines] == [name[0] for name in sources.PRETRAINING for _ in range(16)]
