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


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "GPT2BPETokenizer"])
def test_the_same_bytes(tool, folder, kind, capsys):
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    tokenizer = {
        "HuggingFaceTokenizer": Tokenizer.from_file(str(folder / "tokenizer.json")),
        "GPT2BPETokenizer": ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")),
    }[kind]
    build_as_megatron_lm(folder / "theirs", [tokenizer.encode(text).ids for text in TEXTS], 0)
    files = {
        "HuggingFaceTokenizer": ["--tokenizer-model", folder],
        "GPT2BPETokenizer": ["--vocab-file", folder / "vocab.json", "--merge-file", folder / "merges.txt"],
    }[kind]
    arguments = ["--input", folder / "a.jsonl", "--output-prefix", folder / "p", "--tokenizer-type", kind, *files]
    more = ["--append-eod", "--workers", "1", "--json-keys", "text", "title", "--log-interval", "10"]
    assert tool.main([*map(str, arguments), *more]) == 0
    for end in ("bin", "idx"):
        assert (folder / f"p_text_document.{end}").read_bytes() == (folder / f"theirs.{end}").read_bytes()
    assert (folder / "p_title_document.idx").exists()
    assert "p: 8 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokenizer-type", "HuggingFaceTokenizer"], "needs --tokenizer-model"),
        (["--tokenizer-type", "Llama2Tokenizer"], "begins each document with the id of <s>"),
        (["--tokenizer-type", "NullTokenizer"], "NullTokenizer: not supported"),
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
