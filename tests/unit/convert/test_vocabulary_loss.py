"""New tokens: rows and losses of an import against a computation in numpy on the weights that transformers reads."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.megatron.torch_dist_plan import Target
from megatron_cpt.convert.source import open_source_checkpoint
from megatron_cpt.convert.vocabulary_loss import MAX_BYTES, _parts
from megatron_cpt.errors import UserError
from tests.helpers.hf_models import save_hf_model

VOCAB, START = 101, 95  # the letters from ! on, then <0> to <6>; <1> starts a text
TEXTS = ["abcabc,megatron", "amegatronb", "xyz.abc"]
NEW = ["abc", "megatron", "\u00e9"]  # the tokenizer knows the letters of two of them


def with_tokenizer(folder: Path, family: str, **special: str) -> Path:
    """Write a tiny model and a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    save_hf_model(folder, family, vocab_size=VOCAB)
    vocabulary = {chr(33 + n): n for n in range(94)} | {f"<{n}>": 94 + n for n in range(7)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<0>", **special).save_pretrained(folder)
    return folder


def old_ids(text: str) -> list[int]:
    return [ord(letter) - 33 for letter in text]


def new_ids(text: str) -> list[int]:
    ids = []
    while text:
        token = next((number for number, token in enumerate(NEW) if text.startswith(token)), None)
        ids.append(old_ids(text[0])[0] if token is None else VOCAB + token)
        text = text[1:] if token is None else text[len(NEW[token]) :]
    return ids


def grown(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a table with the rows of the new tokens: of two from their letters, of the last one from all rows."""
    rows = [*(table[old_ids(token)].mean(axis=0) for token in NEW[:2]), table.mean(axis=0)]
    return np.concatenate([table, np.stack(rows)])


def bits_per_byte(
    model: Any, embedding: np.ndarray[Any, Any], head: np.ndarray[Any, Any], ids: list[list[int]]
) -> float:
    import torch

    nats = 0.0
    for row in ids:
        with torch.no_grad():
            hidden = model.model(inputs_embeds=torch.from_numpy(embedding[[START, *row]])[None]).last_hidden_state
        logits = hidden[0, :-1].double().numpy() @ head.T.astype(np.float64)
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        nats += float((log_sum - logits[np.arange(len(row)), row]).sum())
    return nats / math.log(2) / sum(len(text) for text in TEXTS)


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # two tables; one table
def test_rows_and_losses_are_those_of_numpy(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    folder = with_tokenizer(tmp_path / "hf", family, bos_token="<1>")
    (tmp_path / "tokens.txt").write_text("\n".join(NEW))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = ["--add-tokens", str(tmp_path / "tokens.txt"), "--loss-on", str(tmp_path / "text.jsonl")]
    options += ["--tensor", "2", "--json"]
    assert main(["convert", "import", str(folder), str(tmp_path / "c"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["vocabulary"]["without_pieces"] == ["\u00e9"]
    assert (report["vocabulary"]["num_new"], report["vocabulary"]["from_pieces"]) == (3, 2)

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tables = [layer.weight.detach().numpy() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert np.array_equal(*tables) == (family == "qwen3")
    opened = open_source_checkpoint(tmp_path / "c")
    names = ["embedding.word_embeddings.weight", "output_layer.weight"]
    for name, table in zip(names, tables, strict=True):
        if name in opened.specs:
            found = opened.read(name, 0, opened.specs[name].shape[0]).numpy()
            np.testing.assert_allclose(found[: VOCAB + 3], grown(table), rtol=0, atol=1e-7)
            assert not found[VOCAB + 3 :].any()

    loss = report["loss"]
    assert (loss["num_bytes"], loss["tokens_before"]) == (32, 32)
    assert loss["tokens_after"] == sum(len(new_ids(text)) for text in TEXTS) < 32
    before = bits_per_byte(model, *tables, [old_ids(text) for text in TEXTS])
    after = bits_per_byte(model, *map(grown, tables), [new_ids(text) for text in TEXTS])
    assert loss["before"] == pytest.approx(before, rel=1e-5)
    assert loss["after"] == pytest.approx(after, rel=1e-5)
    assert abs(before - after) > 0.01


def test_what_cannot_be_measured_is_found_before_the_import(tmp_path: Path) -> None:
    nothing, text = tmp_path / "nothing.jsonl", tmp_path / "text.jsonl"
    nothing.write_text('{"text": ""}\n')
    text.write_text('{"text": "abc"}\n')
    with_start = with_tokenizer(tmp_path / "hf", "llama", eos_token="<1>")
    without = with_tokenizer(tmp_path / "without", "llama")
    for source, loss_on, tokens, message in (
        (with_start, text, (), "give them with --add-tokens"),
        (with_start, nothing, ("abc",), "nothing.jsonl"),
        (with_start, tmp_path / "none.jsonl", ("abc",), "none.jsonl"),
        (without, text, ("abc",), "no bos_token and no eos_token"),
    ):
        options = ImportOptions(new_tokens=tokens, loss_on=str(loss_on), target=Target())
        with pytest.raises(UserError, match=message):
            import_checkpoint(source, tmp_path / "c", options)
        assert not [path for path in os.listdir(tmp_path) if path.endswith(("c", ".tmp"))]


def test_ids_that_had_no_row_have_no_loss_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    folder = with_tokenizer(tmp_path / "hf", "llama", eos_token="<1>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["abc"])  # id 101; the model has 101 rows
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.jsonl").write_text('{"text": "xabc"}\n')
    (tmp_path / "tokens.txt").write_text("abc\n")
    options = ["--add-tokens", str(tmp_path / "tokens.txt"), "--loss-on", str(tmp_path / "text.jsonl")]
    assert main(["convert", "import", str(folder), str(tmp_path / "c"), *options]) == 0
    out = capsys.readouterr().out
    assert "loss: not defined, since the model had no row for some ids, -> " in out
    assert " bits per byte, on 4 bytes of text = 2 -> 2 tokens\n" in out


def test_parts_end_before_a_space_and_hold_every_byte_once() -> None:
    text = "one two three \u00e9\u00e9\u00e9\u00e9 " + "x" * 25
    parts = _parts([text, "", "last"], 10)
    assert parts[:2] == ["one two", " three"]
    assert "".join(parts) == text + "last"
    assert max(map(len, parts)) <= 10
    assert sum(len(part.encode()) for part in _parts(["word " * MAX_BYTES], 1000)) <= MAX_BYTES
