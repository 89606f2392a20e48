"""Caches of a teacher that no model has made: records that follow from the position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.teacher_cache.cache_header import HEADER_FILE, CacheHeader, TaughtFile, file_name
from megatron_cpt.data.teacher_cache.top_k_records import Records, record_seeds
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.reader import IndexedDataset


def write_cache(folder: Path, prefixes: dict[str, Path], *, top_k: int = 4, vocab: int = 300, **changes: Any) -> Path:
    """Write a cache for one file per source; the ids of position p are p, p + 1 and so on, modulo the vocabulary."""
    files = []
    for name, prefix in prefixes.items():
        dataset = IndexedDataset(str(prefix))
        files.append(TaughtFile(name, dataset.prefix, fingerprint([dataset]), dataset.num_tokens))
    fields: dict[str, Any] = {
        "teacher": "sha256:0",
        "teacher_path": "runs/teacher",
        "precision": {"compute": "fp32"},
        "tokenizer": None,
        "window": 8,
        "stride": 4,
        "documents": DocumentOptions().attention_key,
    }
    header = CacheHeader(**{**fields, "vocab": vocab, "top_k": top_k, "files": tuple(files), **changes})
    folder.mkdir(parents=True)
    for index in range(len(files)):
        (folder / file_name(index)).write_bytes(expected_records(header, index).tobytes())
    (folder / HEADER_FILE).write_bytes(header.to_bytes())
    return folder


def expected_records(header: CacheHeader, index: int) -> Records:
    """Return all records of a file of `write_cache`."""
    count = header.grid(index).num_positions
    ids = (np.arange(count)[:, None] + np.arange(header.top_k)) % header.vocab
    probabilities = np.full((count, header.top_k), 0.9 / header.top_k)
    seeds = record_seeds(header.key(index), 0, count)
    return header.records.make(ids, np.log(probabilities), np.log(np.full(count, 0.1)), seeds)
