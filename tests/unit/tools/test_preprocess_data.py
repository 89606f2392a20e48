"""tools/preprocess_data.py writes the bytes of Megatron-LM's tool, which uses megatron-core's builder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

TEXTS = ["the quick brown fox", "", "jumps over\nthe <|endoftext|> lazy dog", "äöü 中文 🦊 " * 40]


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
    spec = importlib.util.spec_from_file_location("preprocess_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    rows = [{"text": text, "title": f"title {i}"} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS * 5, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.save_model(str(tmp_path))
    return tmp_path


def build_as_megatron_lm(prefix: Path, documents: list[list[int]], eod: int) -> None:
    """Build a dataset with Megatron-LM's loop, which adds an empty document without an end-of-document id."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        ended = [*ids, eod] if ids else []
        builder.add_document(ended, [len(ended)] if ended else [])
    builder.finalize(f"{prefix}.idx")


def run(tool, folder: Path, kind: str, *more) -> list[list[int]]:
    """Run the tool on the rows and return its documents."""
    from megatron_cpt.data.tokenfile.reader import IndexedDataset

    arguments = ["--input", folder / "a.jsonl", "--output-prefix", folder / "p", "--tokenizer-type", kind, *more]
    assert tool.main([*map(str, arguments), "--append-eod", "--workers", "1"]) == 0
    data = IndexedDataset(folder / "p_text_document")
    return [data.document(number).tolist() for number in range(data.num_documents)]


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "GPT2BPETokenizer"])
def test_the_same_bytes(tool, folder, kind, capsys):
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    gpt2 = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    gpt2.add_special_tokens(["<|endoftext|>"])
    tokenizer = {
        "HuggingFaceTokenizer": Tokenizer.from_file(str(folder / "tokenizer.json")),
        "GPT2BPETokenizer": gpt2,
    }[kind]
    build_as_megatron_lm(folder / "theirs", [tokenizer.encode(text).ids for text in TEXTS], 0)
    files = {
        "HuggingFaceTokenizer": ["--tokenizer-model", folder],
        "GPT2BPETokenizer": ["--vocab-file", folder / "vocab.json", "--merge-file", folder / "merges.txt"],
    }[kind]
    more = ["--json-keys", "text", "title", "--log-interval", "10"]
    run(tool, folder, kind, *files, *more)
    for end in ("bin", "idx"):
        assert (folder / f"p_text_document.{end}").read_bytes() == (folder / f"theirs.{end}").read_bytes()
    assert (folder / "p_title_document.idx").exists()
    assert "p: 8 documents" in capsys.readouterr().out


def test_gpt2_takes_a_literal_end_of_text_for_the_token(tool, folder):
    """Compare with transformers' GPT-2 tokenizer, which Megatron-LM calls."""
    transformers = pytest.importorskip("transformers")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    files = ["--vocab-file", folder / "vocab.json", "--merge-file", folder / "merges.txt"]
    expected = [[*ids, theirs.eos_token_id] if (ids := theirs(text).input_ids) else [] for text in TEXTS]
    assert run(tool, folder, "GPT2BPETokenizer", *files) == expected
    assert theirs.eos_token_id in expected[2][:-1]


class TestTemplate:
    @pytest.fixture
    def with_template(self, folder) -> Path:
        from tokenizers import Tokenizer, processors

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(["<bos>"])
        number = tokenizer.token_to_id("<bos>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", number)])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    @pytest.mark.parametrize(
        ("flags", "adds", "says"),
        [
            ([], True, "as in Megatron-LM 0.15 and from 0.19 on"),
            (["--tokenizer-hf-include-special-tokens"], True, ""),
            (["--tokenizer-hf-no-include-special-tokens"], False, "are not written"),
        ],
    )
    def test_included_or_not(self, tool, with_template, capsys, flags, adds, says):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(str(with_template), local_files_only=True)
        encoded = [theirs(text, add_special_tokens=adds).input_ids for text in TEXTS]
        expected = [[*ids, theirs.eos_token_id] if ids else [] for ids in encoded]
        documents = run(tool, with_template, "HuggingFaceTokenizer", "--tokenizer-model", with_template, *flags)
        assert documents == expected
        assert (len(documents[1]) == 2) is adds  # an empty text has the template, too
        err = capsys.readouterr().err.replace("\n", " ")
        assert says in err if says else err == ""

    def test_the_end_of_a_turn_is_written_as_megatron_lm_does(self, tool, with_template):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(with_template / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|im_end|>"])
        tokenizer.save(str(with_template / "tokenizer.json"))
        (with_template / "tokenizer_config.json").write_text(json.dumps(config))
        documents = run(tool, with_template, "HuggingFaceTokenizer", "--tokenizer-model", with_template)
        assert documents[0][-1] == tokenizer.token_to_id("<|im_end|>")


@pytest.mark.parametrize("kind", ["GPTSentencePieceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer"])
def test_sentencepiece_types(tool, folder, kind, capsys):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_prefix=str(folder / "m"), vocab_size=90, hard_vocab_limit=False
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
    expected = [[*ids, model.eos_id()] if (ids := model.encode_as_ids(text)) else [] for text in TEXTS]
    assert run(tool, folder, kind, "--tokenizer-model", folder / "m.model") == expected
    assert ("no <s> begins the documents" in capsys.readouterr().err.replace("\n", " ")) is (kind == "Llama2Tokenizer")


@pytest.mark.parametrize(("more", "eod"), [([], 511), (["--null-tokenizer-eod-id", "7"], 7)])
def test_null_tokenizer(tool, folder, more, eod, capsys):
    (folder / "a.jsonl").write_text('{"text": "1 2 300"}\n{"text": ""}\n{"text": "5"}\n')
    assert run(tool, folder, "NullTokenizer", "--vocab-size", 512, *more) == [[1, 2, 300, eod], [], [5, eod]]
    (folder / "a.jsonl").write_text('{"text": "1 512"}\n')
    arguments = ["--input", folder / "a.jsonl", "--output-prefix", folder / "q", "--tokenizer-type", "NullTokenizer"]
    assert tool.main([*map(str, arguments), "--vocab-size", "512", "--workers", "1"]) == 2
    assert "'1 512' is not a list of ids below" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_tiktokenizer(tool, folder, pattern):
    """Ids of Megatron-LM's TikTokenizer: the ids of tiktoken, after the special tokens."""
    pytest.importorskip("transformers")
    import base64

    pieces = [*(bytes([i]) for i in range(256)), b"th", b"the", b" q", b"qu", b"ui", b"azy", b"la", b"zy", b" la"]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode("latin-1")}
        for rank, piece in enumerate(pieces)
    ]
    (folder / "vocab.tik.json").write_text(json.dumps(vocabulary))
    rows = ["the quick lazy", "", "the </s> lazy\n\n12", "äöü 中文 🦊 DON'T"]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    size = 10 + len(pieces)
    documents = run(
        tool,
        folder,
        "TikTokenizer",
        *("--tokenizer-model", folder / "vocab.tik.json", "--vocab-size", size),
        *("--tiktoken-num-special-tokens", 10, "--tiktoken-pattern", pattern),
    )
    assert documents[0][0] == 10 + pieces.index(b"the")
    assert 2 in documents[2][:-1]
    assert documents[1] == []
    try:
        import tiktoken
    except ImportError:
        return  # the comparison is made where tiktoken is installed
    special = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>"]
    special += [f"<SPECIAL_{i}>" for i in range(len(special), 10)]
    theirs = tiktoken.Encoding(
        "t",
        pat_str=tool._PATTERNS[pattern],
        mergeable_ranks={piece: 10 + rank for rank, piece in enumerate(pieces)},
        special_tokens={token: rank for rank, token in enumerate(special)},
    )
    encoded = [theirs.encode(text, allowed_special="all") for text in rows]
    assert documents == [[*ids, 2] if ids else [] for ids in encoded]


def test_the_fastest_number_of_workers(tool, folder, capsys):
    more = ["--tokenizer-model", folder, "--find-optimal-num-workers", "--workers-to-check", 1, 2]
    documents = run(
        tool, folder, "HuggingFaceTokenizer", *more, "--max-documents", 3, "--performance-dir", folder / "speed"
    )
    assert len(documents) == len(TEXTS)
    assert sorted(path.name for path in (folder / "speed").iterdir()) == ["1_workers.json", "2_workers.json"]
    assert "2 workers: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokenizer-type", "HuggingFaceTokenizer"], "needs --tokenizer-model"),
        (["--tokenizer-type", "Llama2Tokenizer"], "needs --tokenizer-model"),
        (["--tokenizer-type", "NullTokenizer"], "needs --vocab-size"),
        (["--tokenizer-type", "SFTTokenizer"], "SFTTokenizer: not supported (supported: HuggingFaceTokenizer, "),
        (["--tokenizer-type", "TikTokenizer", "--tokenizer-model", "none"], "not a JSON file of TikTokenizer"),
        (["--tokenizer-type", "HuggingFaceTokenizer", "--trust-remote-code"], "--trust-remote-code: not supported"),
        (["--tokenizer-type", "HuggingFaceTokenizer", "--special-tokens", "<x>"], "--special-tokens: not supported"),
        (
            ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--find-optimal-num-workers"],
            "needs --performance-dir",
        ),
        (["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "none"], "--vocab-file none: no such file"),
        (["--tokenizer-type", "HuggingFaceTokenizer", "--split-sentences"], "--split-sentences: not supported"),
        (["--tokenizer-type", "HuggingFaceTokenizer", "--partitions", "2"], "--keep-sequential-samples"),
    ],
)
def test_what_cannot_be_kept_is_refused(tool, folder, capsys, arguments, says):
    common = ["--input", str(folder / "a.jsonl"), "--output-prefix", str(folder / "p"), "--workers", "1"]
    assert tool.main([*common, *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not list(folder.glob("p*"))
