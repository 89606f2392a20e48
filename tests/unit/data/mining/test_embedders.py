"""Embedders: rows of length 1, zeros for empty texts, a digest of the files, no model from the network."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from megatron_cpt.data.mining.embedders import load_embedder
from megatron_cpt.errors import UserError


def test_a_static_model(static_model, tmp_path):
    embedder = load_embedder(static_model)
    vectors = embedder.embed(["w1 w2 w3", "", "unknown", "w4"])
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1).round(5).tolist() == [1, 0, 0, 1]
    assert (embedder.embed(["w4"])[0] == vectors[3]).all()
    copy = tmp_path / "copy"
    shutil.copytree(static_model.partition(":")[2], copy)
    assert load_embedder(f"model2vec:{copy}").digest == embedder.digest
    (copy / "README.md").write_text("another")
    assert load_embedder(f"model2vec:{copy}").digest != embedder.digest


class StandInTransformer:
    """Records how it is opened; the vector of a text is its length and 1."""

    opened: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder, **options):
        StandInTransformer.opened = options

    def encode(self, texts, *, normalize_embeddings, **_):
        assert normalize_embeddings
        vectors = np.array([[len(text), 1] for text in texts], np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_sentence_transformer(monkeypatch, tmp_path):
    module = SimpleNamespace(SentenceTransformer=StandInTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    embedder = load_embedder(f"sentence-transformers:{tmp_path}")
    options = StandInTransformer.opened
    assert (options["local_files_only"], options["trust_remote_code"]) == (True, False)
    assert options["model_kwargs"] == {"use_safetensors": True}
    vectors = embedder.embed(["abc", "  "])
    assert vectors.dtype == np.float32
    assert vectors[1].tolist() == [0, 0]  # a transformer gives some vector for a text of blanks


@pytest.mark.parametrize("spec", ["model2vec", "model2vec:", "sentence-transformers:minishlab/potion-base-8M", "byte"])
def test_only_folders_are_read(spec):
    with pytest.raises(UserError, match=f"embedder .?{spec}"):
        load_embedder(spec)
