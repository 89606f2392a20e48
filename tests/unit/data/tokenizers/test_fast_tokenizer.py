"""gigatoken replaces the library only where it gives the same ids; a difference is never silent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.data.preprocess import pipeline as preprocess_module
from megatron_cpt.data.preprocess import preprocess_run
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.data.tokenizers import fast as module
from megatron_cpt.data.tokenizers.certificate import Certificate, CertificateStore, certify
from megatron_cpt.data.tokenizers.fast import (
    CheckedTokenizer,
    FastTokenizerMismatchError,
    TokenizerPlan,
    load_fast,
    make_certificate,
    plan_tokenizer,
)
from megatron_cpt.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from megatron_cpt.errors import UserError

GOOD = Certificate(True)


def slow(texts):
    return [list(text.encode()) for text in texts]


def fast_but(wrong) -> object:
    """Bytes, and 7 more where `wrong(text)`."""
    return lambda text: np.array(list(text.encode()) + [7] * bool(wrong(text)), np.uint32)


@pytest.fixture
def few_code_points(monkeypatch):
    """Certificates in a second."""
    monkeypatch.setattr("megatron_cpt.data.tokenizers.certificate._PROBED", (range(0, 0x300), range(0x2000, 0x2100)))


@pytest.fixture(scope="module")
def bpe_spec(tmp_path_factory) -> str:
    """A byte-level BPE as GPT-2's, trained here."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return f"huggingface:{path}"


@pytest.mark.usefixtures("few_code_points")
class TestCertify:
    def test_equal(self):
        certificate = certify(slow, fast_but(lambda text: False), ["piece"], ["<s>"])
        assert (certificate.certified, certificate.unsafe_texts) == (True, [])
        # all that was never looked at is unsafe
        assert certificate.unsafe_ranges == [(0x300, 0x1FFF), (0x2100, 0x10FFFF)]
        assert certificate.num_probes > 20_000

    def test_characters_that_differ_are_found_one_by_one(self):
        certificate = certify(slow, fast_but(lambda text: "é" in text or "\u2020" in text), [], [])
        assert certificate.certified
        assert (0xE9, 0xE9) in certificate.unsafe_ranges
        assert (0x2020, 0x2020) in certificate.unsafe_ranges
        assert len(certificate.unsafe_ranges) == 4

    def test_special_tokens_that_differ(self):
        certificate = certify(slow, fast_but(lambda text: "<s>" in text), ["<s>", "a"], ["<s>", "</s>"])
        assert (certificate.certified, certificate.unsafe_texts) == (True, ["<s>"])

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            (lambda text: "Z" in text, r"1 characters give other ids, the first is U\+005A"),
            (lambda text: text == "piece", "other ids for 'piece'"),
            (lambda text: "\n\t\r" in text, "other ids for"),
            (lambda text: len(text) > 2500, "other ids for"),
        ],
    )
    def test_what_is_not_explained_means_no(self, wrong, says):
        certificate = certify(slow, fast_but(wrong), ["piece"], [])
        assert not certificate.certified
        import re

        assert re.match(says, certificate.reason)


class TestStore:
    def test_kept_by_fingerprint_and_versions(self, tmp_path):
        store = CertificateStore(tmp_path / "new")
        certificate = Certificate(True, "", [(200, 300)], ["<s>"], 5, 1.5)
        store.save("f", "v 1", certificate)
        assert store.load("f", "v 1") == certificate
        assert store.load("f", "v 2") is None
        assert store.load("g", "v 1") is None

    def test_what_cannot_be_read_is_made_again(self, tmp_path):
        store = CertificateStore(tmp_path)
        store.save("f", "v", GOOD)
        (file,) = tmp_path.iterdir()
        file.write_bytes(b"{")
        assert store.load("f", "v") is None

    def test_a_folder_that_cannot_be_written_is_no_error(self, tmp_path):
        (tmp_path / "file").touch()
        CertificateStore(tmp_path / "file").save("f", "v", GOOD)


class TestCheckedTokenizer:
    def test_unsafe_documents_are_left_to_the_library(self):
        certificate = Certificate(True, "", [(0xE9, 0xE9), (0x1F600, 0x1F60F)], ["<s>", "</s>"])
        wrong = fast_but(lambda text: "é" in text or "\U0001f605" in text or "<s>" in text)
        tokenizer = CheckedTokenizer(ByteTokenizer(), wrong, certificate, "all")
        texts = ["plain", "caf\u00e9", "", "a<s>b", "\U0001f605", "\U0001f9ff fine", "ä"]
        assert [ids.tolist() for ids in tokenizer.encode_arrays(texts)] == [list(text.encode()) for text in texts]
        assert tokenizer.encode_arrays([]) == []

    def test_all_are_compared_if_that_is_wanted(self):
        tokenizer = CheckedTokenizer(ByteTokenizer(), fast_but(lambda text: text == "x57"), GOOD, "all")
        with pytest.raises(FastTokenizerMismatchError, match="'x57'"):
            tokenizer.encode_arrays([f"x{i}" for i in range(100)])

    def test_a_sample_of_each_batch_is_compared(self):
        tokenizer = CheckedTokenizer(ByteTokenizer(), fast_but(lambda text: "bad" in text), GOOD)
        found = 0
        for batch in range(200):
            try:
                tokenizer.encode_arrays([f"{batch} {i} {'bad' if i < 3 else ''}" for i in range(10)])
            except FastTokenizerMismatchError:
                found += 1
        assert 30 <= found <= 90  # 60 expected, of 200 batches in which 3 of 10 texts are wrong

    def test_of_a_long_document_a_part(self):
        seen = []

        class Spy(ByteTokenizer):
            def encode_batch(self, texts):
                seen.extend(map(len, texts))
                return super().encode_batch(texts)

        CheckedTokenizer(Spy(), fast_but(lambda text: False), GOOD).encode_arrays(["x" * 1_000_000])
        assert seen == [512]


class TestPlan:
    def test_bytes_have_none(self):
        plan = plan_tokenizer("byte", ByteTokenizer(), input_bytes=1 << 40)
        assert (plan.certificate, plan.engine) == (None, "byte")
        with pytest.raises(UserError, match="gigatoken does not support this kind"):
            plan_tokenizer("byte", ByteTokenizer(), when="on")

    def test_without_the_package(self, bpe_spec, monkeypatch):
        monkeypatch.setattr(module, "library_versions", lambda tokenizer: None)
        tokenizer = load_tokenizer(bpe_spec)
        assert plan_tokenizer(bpe_spec, tokenizer, input_bytes=1 << 40).certificate is None
        with pytest.raises(UserError, match=r"gigatoken is not installed; pip install -e '.*\[fast\]'"):
            plan_tokenizer(bpe_spec, tokenizer, when="on")

    def test_made_where_it_pays_and_kept(self, bpe_spec, tmp_path, monkeypatch):
        made = []
        monkeypatch.setattr(module, "library_versions", lambda tokenizer: "some")
        monkeypatch.setattr(module, "make_certificate", lambda tokenizer: made.append(1) or GOOD)
        store, tokenizer = CertificateStore(tmp_path), load_tokenizer(bpe_spec)
        assert plan_tokenizer(bpe_spec, tokenizer, input_bytes=1000, store=store).certificate is None
        assert made == []
        for size in (1 << 40, 1000):  # the second time the certificate exists
            plan = plan_tokenizer(bpe_spec, tokenizer, input_bytes=size, store=store)
            assert (plan.certificate, plan.engine) == (GOOD, "gigatoken")
        assert made == [1]
        assert plan_tokenizer(bpe_spec, tokenizer, when="off", input_bytes=1 << 40, store=store).certificate is None


@pytest.fixture
def corpus(tmp_path) -> Path:
    from pydoc_data.topics import topics

    texts = [*topics.values(), "special <|endoftext|> inside", "\u1ac1 \U000e1000 \ud7ff", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return tmp_path / "a.jsonl"


def pair(prefix) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_gigatoken_itself_on_a_real_bpe(bpe_spec, corpus, tmp_path, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr("megatron_cpt.data.tokenizers.certificate._PROBED", (range(0, 0x800), range(0x1A00, 0x2100)))
    certificate = make_certificate(load_tokenizer(bpe_spec))
    assert certificate.certified, certificate.reason
    monkeypatch.setattr(preprocess_module, "plan_tokenizer", lambda spec, *_, **__: TokenizerPlan(spec, certificate))
    report = preprocess([corpus], tmp_path / "fast", tokenizer=bpe_spec, options=PreprocessOptions(append_eod=True))
    assert (report.engine, report.mismatch) == ("gigatoken", None)
    monkeypatch.undo()
    report = preprocess(
        [corpus],
        tmp_path / "slow",
        tokenizer=bpe_spec,
        options=PreprocessOptions(append_eod=True, fast_tokenizer="off"),
    )
    assert report.engine == "huggingface"
    assert pair(tmp_path / "fast") == pair(tmp_path / "slow")


def test_a_difference_ends_the_trust_and_all_is_encoded_again(bpe_spec, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(bpe_spec)
    monkeypatch.setattr(module, "library_versions", lambda tokenizer: "some")
    monkeypatch.setattr(module, "load_fast", lambda tokenizer: lambda text: np.array([1, 2, 3], np.uint32))
    CertificateStore().save(tokenizer.fingerprint, "some", GOOD)
    notes: list[str] = []
    report = preprocess(
        [corpus], tmp_path / "p", tokenizer=bpe_spec, options=PreprocessOptions(append_eod=True, notify=notes.append)
    )
    assert report.mismatch is not None
    assert report.mismatch.startswith("gigatoken and the library disagree on ")
    assert report.engine == "huggingface"
    assert any("everything is encoded again by the library" in note for note in notes)
    preprocess(
        [corpus],
        tmp_path / "slow",
        tokenizer=bpe_spec,
        options=PreprocessOptions(append_eod=True, fast_tokenizer="off"),
    )
    assert pair(tmp_path / "p") == pair(tmp_path / "slow")
    revoked = CertificateStore().load(tokenizer.fingerprint, "some")
    assert revoked is not None
    assert not revoked.certified
    assert (
        preprocess([corpus], tmp_path / "next", tokenizer=bpe_spec, options=PreprocessOptions(append_eod=True)).mismatch
        is None
    )


def test_a_resumed_run_restarts_when_its_certificate_is_gone(bpe_spec, corpus, tmp_path, monkeypatch):
    small = {"block_bytes": 10_000}
    monkeypatch.setattr(preprocess_run, "SAVE_SECONDS", -1)
    plan = TokenizerPlan(bpe_spec, GOOD)
    monkeypatch.setattr(preprocess_module, "plan_tokenizer", lambda *_, **__: plan)
    wrong_beyond_the_sample = load_tokenizer(bpe_spec)
    monkeypatch.setattr(preprocess_run, "build_tokenizer", lambda plan: wrong_beyond_the_sample)

    def stop(done, *_):
        if done > 50_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess([corpus], tmp_path / "p", tokenizer=bpe_spec, options=PreprocessOptions(progress=stop, **small))
    monkeypatch.undo()
    notes: list[str] = []
    preprocess(
        [corpus],
        tmp_path / "p",
        tokenizer=bpe_spec,
        options=PreprocessOptions(fast_tokenizer="off", **small, notify=notes.append),
    )
    assert notes == [
        "starting from scratch: the interrupted run used gigatoken, which is no longer trusted with this tokenizer"
    ]
    preprocess([corpus], tmp_path / "whole", tokenizer=bpe_spec, options=PreprocessOptions(fast_tokenizer="off"))
    assert pair(tmp_path / "p") == pair(tmp_path / "whole")


def test_the_fast_one_reads_the_same_file(bpe_spec):
    pytest.importorskip("gigatoken")
    tokenizer = load_tokenizer(bpe_spec)
    encode = load_fast(tokenizer)
    assert encode("def f(x): return x").tolist() == tokenizer.encode("def f(x): return x")
