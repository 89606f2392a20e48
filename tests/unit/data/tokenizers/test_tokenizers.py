"""Tokenizers by KIND:PATH, on tiny ones trained here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer, read_fingerprint
from megatron_cpt.errors import UserError

TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "äöü 中文 🦊", ""]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:2] * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return folder / "tokenizer.model"


def save_bpe(file: Path, special: list[str]) -> None:
    """Save a byte-level BPE whose file asks for everything that `load_tokenizer` must switch off."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", *special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:2] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(file))


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("huggingface") / "tokenizer.json"
    save_bpe(file, ["<|endoftext|>", "<|im_end|>"])
    return file


@pytest.fixture(params=["sentencepiece", "huggingface", "byte"])
def spec(request) -> str:
    files = {"sentencepiece": "sentencepiece_model", "huggingface": "bpe_file"}
    if request.param == "byte":
        return "byte"
    return f"{request.param}:{request.getfixturevalue(files[request.param])}"


def test_every_kind(spec):
    tokenizer = load_tokenizer(spec)
    batch = tokenizer.encode_batch(TEXTS)
    assert batch == [tokenizer.encode(text) for text in TEXTS]
    assert [tokenizer.decode(ids) for ids in batch] == TEXTS
    assert batch[3] == []  # nothing is added, not even to an empty text
    arrays = tokenizer.encode_arrays(TEXTS)
    assert [ids.tolist() for ids in arrays] == batch
    assert {ids.dtype.kind for ids in arrays} == {"u"}
    assert max(map(max, filter(None, batch))) < tokenizer.vocab_size
    assert not any(tokenizer.eod_id in ids for ids in batch)
    assert tokenizer.decode(np.array(batch[0])) == TEXTS[0]  # ids as a dataset returns them


def test_nothing_to_encode(spec):
    assert load_tokenizer(spec).encode_arrays([]) == []


@given(text=st.text())
def test_byte_round_trip(text):
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, 256]) == text


def test_byte():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.fingerprint) == (257, 256, "byte")


def test_sentencepiece(sentencepiece_model):
    import sentencepiece

    tokenizer = load_tokenizer(f"sentencepiece:{sentencepiece_model}")
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert tokenizer.encode(TEXTS[0]) == model.encode(TEXTS[0])
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (model.vocab_size(), model.eos_id())
    assert tokenizer.fingerprint == hashlib.sha256(sentencepiece_model.read_bytes()).hexdigest()


def test_huggingface_encodes_whole_texts_and_adds_nothing(bpe_file):
    ids = load_tokenizer(f"huggingface:{bpe_file}").encode(TEXTS[0])
    assert len(ids) > 5  # the file asks for truncation at 5
    assert 0 not in ids  # and for <bos> at the beginning


class TestHuggingFaceEndOfDocument:
    def test_usual_name(self, bpe_file):
        assert load_tokenizer(f"huggingface:{bpe_file}").eod_id == 1
        assert load_tokenizer(f"huggingface:{bpe_file.parent}").eod_id == 1  # a folder without a configuration

    @pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
    def test_of_the_folder(self, tmp_path, eos):
        bpe_file = tmp_path / "tokenizer.json"
        save_bpe(bpe_file, ["a b", "<|im_end|>"])  # no token that ends a document
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        tokenizer = load_tokenizer(f"huggingface:{tmp_path}")
        assert tokenizer.eod_id == 2
        assert tokenizer.fingerprint == hashlib.sha256(bpe_file.read_bytes()).hexdigest()

    def test_that_the_vocabulary_lacks(self, tmp_path, bpe_file):
        (tmp_path / "tokenizer.json").write_bytes(bpe_file.read_bytes())
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
        with pytest.raises(UserError, match="names '<stop>'"):
            load_tokenizer(f"huggingface:{tmp_path}")

    def test_none(self, tmp_path):
        save_bpe(tmp_path / "tokenizer.json", [])
        assert load_tokenizer(f"huggingface:{tmp_path}").eod_id is None


@pytest.mark.parametrize(
    "spec", ["", "bytes", "byte:x", "sentencepiece", "huggingface:", "tiktoken:gpt2", "/a/tokenizer.model"]
)
def test_unknown_kind(spec):
    with pytest.raises(UserError, match="give one of sentencepiece:"):
        load_tokenizer(spec)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_wrong_files(tmp_path, kind):
    with pytest.raises(UserError, match="No such file"):
        load_tokenizer(f"{kind}:{tmp_path}/none")
    (tmp_path / "noise").write_bytes(b"\x00\xffnot a tokenizer")
    with pytest.raises(UserError, match=rf"{tmp_path}/noise: not a "):
        load_tokenizer(f"{kind}:{tmp_path}/noise")


def test_importing_the_package_loads_no_tokenizer_library():
    import subprocess
    import sys

    heavy = "{'torch', 'tokenizers', 'sentencepiece', 'transformers', 'megatron'}"
    script = (
        f"import sys, megatron_cpt.data, megatron_cpt.data.preprocess.pipeline; assert not {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_fingerprints_without_the_library(sentencepiece_model, bpe_file):
    for spec in ("byte", "null:300", f"sentencepiece:{sentencepiece_model}", f"huggingface:{bpe_file}"):
        assert read_fingerprint(spec) == load_tokenizer(spec).fingerprint
