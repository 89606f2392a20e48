"""A small static model of made-up words for document mining, and corpora with planted paraphrases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORDS = 2000
_SYNONYM_NOISE = 0.2  # words 2 i and 2 i + 1 are synonyms
_DIMENSIONS = 64


def words(numbers) -> str:
    return " ".join(f"w{number}" for number in numbers)


def write_static_model(folder: Path, *, seed: int = 7) -> str:
    """Write a model2vec model that knows the words w0 to w1999; return its KIND:DIR."""
    from model2vec import StaticModel
    from tokenizers import Tokenizer, models, pre_tokenizers

    rng = np.random.default_rng(seed)
    meanings = np.repeat(rng.normal(size=(WORDS // 2, _DIMENSIONS)), 2, axis=0)
    vectors = meanings + _SYNONYM_NOISE * rng.normal(size=meanings.shape)
    vocabulary = {"[UNK]": 0} | {f"w{number}": number + 1 for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.concatenate([np.zeros((1, _DIMENSIONS)), vectors]).astype(np.float32)
    StaticModel(vectors, tokenizer, config={"normalize": True}, normalize=True).save_pretrained(folder)
    return f"model2vec:{folder}"


@dataclass(frozen=True)
class PlantedCorpus:
    """Texts of a corpus; the paraphrase of query i is document `planted[i]`."""

    queries: list[str]
    documents: list[str]
    planted: list[int]


def plant(num_documents: int, num_queries: int, *, seed: int = 1) -> PlantedCorpus:
    """Hide a paraphrase of each query among documents: a third of its words replaced by synonyms, the rest shuffled."""
    rng = np.random.default_rng(seed)
    queries = [rng.integers(0, WORDS, 30) for _ in range(num_queries)]
    documents = [words(rng.integers(0, WORDS, rng.integers(20, 60))) for _ in range(num_documents)]
    planted = rng.choice(num_documents, num_queries, replace=False).tolist()
    for query, place in zip(queries, planted, strict=True):
        changed = np.where(rng.random(30) < 1 / 3, query ^ 1, query)
        documents[place] = words([*rng.permutation(changed), *rng.integers(0, WORDS, 8)])
    return PlantedCorpus([words(query) for query in queries], documents, planted)
