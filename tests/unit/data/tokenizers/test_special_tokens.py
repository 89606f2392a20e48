"""Ids that end and begin a document: one rule for every way to name a tokenizer, and transformers' answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
from megatron_cpt.errors import UserError

TOKENS = ("<bos>", "<|endoftext|>", "<|im_end|>", "</s>", "<eos>", "<s>")
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
ADDED = {
    "content": "<stop>",
    "special": True,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
}


def write_tokenizer(folder: Path, tokens=TOKENS, *, config=None, token_map=None, template="") -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ("<unk>", *tokens, "a", "b")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(tokens))
    if template:
        ids = [(token, words.index(token)) for token in template.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", token_map)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


CASES = {
    "string": ({**FAST, "eos_token": "<eos>"}, None),
    "object": ({**FAST, "eos_token": {"content": "<eos>", "__type": "AddedToken"}}, None),
    "null": ({**FAST, "eos_token": None}, None),
    "empty": ({**FAST, "eos_token": ""}, None),
    "map alone": (None, {"eos_token": "</s>"}),
    "map with an object": (FAST, {"eos_token": {"content": "</s>"}}),
    "map before configuration": ({**FAST, "eos_token": "<eos>"}, {"eos_token": "</s>"}),
    "map before null": ({**FAST, "eos_token": None}, {"eos_token": "</s>"}),
    "configuration with added tokens": (
        {**FAST, "eos_token": "<eos>", "added_tokens_decoder": {"5": {**ADDED, "content": "<eos>"}}},
        {"eos_token": "</s>"},
    ),
    **{
        name: ({"tokenizer_class": name}, None)
        for name in ("LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer")
    },
    "null of a class": ({"tokenizer_class": "LlamaTokenizer", "eos_token": None}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_answer_of_transformers(tmp_path, case):
    transformers = pytest.importorskip("transformers")
    config, token_map = CASES[case]
    folder = write_tokenizer(tmp_path, config=config, token_map=token_map)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True).eos_token or None
    for spec in (f"huggingface:{folder}", f"huggingface:{folder}/tokenizer.json"):
        ours = load_tokenizer(spec)
        assert (None if ours.eod_id is None else ours.token_name(ours.eod_id)) == theirs
        assert ours.eod_note == ""


def test_without_an_answer_a_guess_is_said_aloud(tmp_path):
    folder = write_tokenizer(tmp_path)
    for spec in (f"huggingface:{folder}", f"huggingface:{folder}/tokenizer.json"):
        tokenizer = load_tokenizer(spec)
        assert tokenizer.eod_id == 2
        assert "a guess: '<|endoftext|>' (id 2)" in tokenizer.eod_note


def test_a_turn_of_a_chat_does_not_end_a_document(tmp_path):
    config = {**FAST, "eos_token": "<|im_end|>"}
    tokenizer = load_tokenizer(f"huggingface:{write_tokenizer(tmp_path, config=config)}")
    assert tokenizer.eod_id == 2
    assert "'<|endoftext|>' (id 2)" in tokenizer.eod_note
    assert "'<|im_end|>' (id 3) ends a turn" in tokenizer.eod_note
    alone = load_tokenizer(f"huggingface:{write_tokenizer(tmp_path / 'alone', ['<|im_end|>'], config=config)}")
    assert (alone.eod_id, alone.eod_note) == (1, "")


def test_sentencepiece_follows_the_files_beside_it(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=30,
        user_defined_symbols=["<end_of_turn>", "<eos>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    for config, expected in (({}, "</s>"), ({"eos_token": "<eos>"}, "<eos>"), ({"eos_token": "<end_of_turn>"}, "</s>")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        for spec in (f"sentencepiece:{tmp_path}", f"sentencepiece:{tmp_path}/tokenizer.model"):
            tokenizer = load_tokenizer(spec)
            assert tokenizer.token_name(tokenizer.eod_id) == expected
            assert tokenizer.token_name(tokenizer.bos_id) == "<s>"
    assert "ends a turn" in tokenizer.eod_note
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert load_tokenizer(f"sentencepiece:{tmp_path}").eod_id is None


class TestOtherFiles:
    def test_messages_lead_on(self, tmp_path):
        folder = write_tokenizer(tmp_path / "json")
        with pytest.raises(UserError, match=rf"no tokenizer.model in it; use huggingface:{folder}"):
            load_tokenizer(f"sentencepiece:{folder}")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "tokenizer.model").touch()
        with pytest.raises(UserError, match=r"use sentencepiece:.*/model/tokenizer\.model"):
            load_tokenizer(f"huggingface:{tmp_path / 'model'}")
        (tmp_path / "empty").mkdir()
        for kind in ("sentencepiece", "huggingface"):
            with pytest.raises(UserError, match="in it; give the"):
                load_tokenizer(f"{kind}:{tmp_path / 'empty'}")

    def test_vocab_and_merges(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        from tokenizers import ByteLevelBPETokenizer

        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(["the quick fox"] * 9, vocab_size=300, special_tokens=["<|endoftext|>"])
        bpe.save_model(str(tmp_path))
        with pytest.raises(UserError, match=r'name the class in .*tokenizer_config.json, such as {"tokenizer_class"'):
            load_tokenizer(f"huggingface:{tmp_path}")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        tokenizer = load_tokenizer(f"huggingface:{tmp_path}")
        text = "the quick <|endoftext|> fox äöü"
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
        assert tokenizer.encode(text) == theirs(text).input_ids
        assert tokenizer.eod_id == theirs.eos_token_id

    def test_tekken(self, tmp_path):
        pytest.importorskip("transformers")
        import base64

        vocabulary = [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("latin-1")}
            for rank, token in enumerate([*(bytes([i]) for i in range(256)), b"th", b"the"])
        ]
        special = [
            {"rank": rank, "token_str": token, "is_control": True}
            for rank, token in enumerate(["<unk>", "<s>", "</s>"])
        ]
        config = {"pattern": r"\w+|\s+|[^\w\s]+", "default_vocab_size": 268, "default_num_special_tokens": 10}
        content = {"config": config | {"version": "v7"}, "vocab": vocabulary, "special_tokens": special}
        (tmp_path / "tekken.json").write_text(json.dumps(content))
        (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
        tokenizer = load_tokenizer(f"huggingface:{tmp_path}")
        assert tokenizer.encode("the a") == [267, 10 + ord(" "), 10 + ord("a")]
        assert tokenizer.eod_id == 2


class TestCommand:
    @pytest.fixture
    def encode(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Path("a.jsonl").write_text('{"text": "a b"}\n{"text": ""}\n{"text": "b"}\n')

        def run(*arguments: str):
            status = main(
                [
                    "preprocess",
                    "--input",
                    "a.jsonl",
                    "--output-prefix",
                    "p",
                    "--overwrite",
                    "--workers",
                    "1",
                    *arguments,
                ]
            )
            captured = capsys.readouterr()
            if status:
                return status, captured.err
            data = IndexedDataset("p")
            return [data.document(i).tolist() for i in range(data.num_documents)], captured

        return run

    def test_the_report_names_the_id(self, encode, tmp_path):
        config = {**FAST, "eos_token": "<|im_end|>", "bos_token": "<bos>"}
        folder = write_tokenizer(tmp_path / "t", config=config)
        documents, captured = encode("--tokenizer", f"huggingface:{folder}", "--append-eod")
        assert documents == [[7, 8, 2], [8, 2]]
        assert "each document ends with id 2 ('<|endoftext|>')\n" in captured.out
        assert "note: documents end with '<|endoftext|>' (id 2); the tokenizer's eos_token" in captured.err

    @pytest.mark.parametrize("eod", ["<|im_end|>", "3"])
    def test_another_end(self, encode, tmp_path, eod):
        folder = write_tokenizer(tmp_path / "t", config={**FAST, "eos_token": None})
        spec = f"huggingface:{folder}"
        status, message = encode("--tokenizer", spec, "--append-eod")
        assert status == 2
        assert "name one: --eod TOKEN_OR_ID" in message
        documents, captured = encode("--tokenizer", spec, "--eod", eod)
        assert documents == [[7, 8, 3], [8, 3]]
        assert "each document ends with id 3 ('<|im_end|>')\n" in captured.out

    @pytest.mark.parametrize("eod", ["<none>", "257", "-1"])
    def test_an_end_that_the_vocabulary_lacks(self, encode, eod):
        status, message = encode("--tokenizer", "byte", f"--eod={eod}")
        assert status == 2
        assert (
            f"eod '{eod}': not in the vocabulary of tokenizer byte; give one of its tokens, or an id below 257"
            in message
        )

    def test_beginning_of_a_sequence(self, encode, tmp_path):
        for config, template in (({**FAST, "bos_token": "<s>"}, ""), (FAST, "<s> $A")):
            folder = write_tokenizer(tmp_path / f"t{len(template)}", config=config, template=template)
            documents, captured = encode("--tokenizer", f"huggingface:{folder}", "--append-eod", "--prepend-bos")
            assert documents == [[6, 7, 8, 2], [6, 8, 2]]
            assert "begins with id 6 ('<s>') and ends with id 2 ('<|endoftext|>')" in captured.out
        documents, captured = encode("--tokenizer", f"huggingface:{folder}")
        assert documents == [[7, 8], [8]]
        assert "template puts ids [6] before and [] after a text; they are not written" in captured.err
        status, message = encode("--tokenizer", "byte", "--prepend-bos")
        assert status == 2
        assert "names no bos_token" in message

    def test_byte(self, encode):
        documents, captured = encode("--tokenizer", "byte", "--append-eod")
        assert documents[1] == [98, 256]
        assert "each document ends with id 256\n" in captured.out
        assert captured.err == ""
