"""Targets of a cached teacher in the micro-batches of the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cpt.data import BlendCursor, Loader, PhaseBlend, TokenStream
from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.loading.fim import FillInMiddle
from megatron_cpt.data.loading.teacher_targets import CachedTeacher
from megatron_cpt.errors import RefusedError, UserError
from tests.helpers.runs import write_source
from tests.helpers.teacher_caches import write_cache

LENGTH = 8
NAMES = ("web", "qa")


@pytest.fixture
def streams(tmp_path: Path) -> list[TokenStream]:
    for stride, name in enumerate(NAMES, start=1):
        write_source(tmp_path / name, stride=stride, documents=4)
    write_cache(tmp_path / "cache", {name: tmp_path / name for name in NAMES}, tokenizer="aa", vocab=300)
    return [open_stream(tmp_path, name) for name in NAMES]


def open_stream(folder: Path, name: str, seed: int = 3, fim: FillInMiddle | None = None) -> TokenStream:
    return TokenStream.open(name, str(folder / name), seq_length=LENGTH, seed=seed, fim=fim)


def open_teacher(folder: Path, streams: list[TokenStream], sources=NAMES, **changes: Any) -> CachedTeacher:
    fields: dict[str, Any] = {"documents": DocumentOptions(), "vocab_size": 300, "tokenizer": ("tok", "aa"), **changes}
    return CachedTeacher.open(str(folder / "cache"), streams, sources, **fields)


@pytest.mark.parametrize(("seed", "length"), [(3, LENGTH), (99, LENGTH), (3, LENGTH // 2)])
def test_targets_are_the_records_at_the_positions_of_each_sample(tmp_path, streams, seed, length) -> None:
    streams = [open_stream(tmp_path, name, seed) for name in NAMES]
    teacher = open_teacher(tmp_path, streams)
    sources, indices = np.array([0, 1, 0, 1]), np.array([0, 1, 700, 333])
    targets = teacher.read(streams, sources, indices, length)
    for row, (source, index) in enumerate(zip(sources, indices, strict=True)):
        start = streams[source].locate(int(index), length).token_offset
        assert (targets.ids[row] == (start + np.arange(length)[:, None] + np.arange(4)) % 300).all()
    np.testing.assert_allclose(np.exp(targets.log_tail.astype(float)), 0.1, rtol=2e-3)
    assert all(array.flags.c_contiguous for array in (targets.ids, targets.log_probs, targets.log_tail))


def test_the_loader_gives_each_micro_batch_its_own_targets(tmp_path, streams) -> None:
    cursor = BlendCursor([PhaseBlend("all", 0, 16, {"web": 0.5, "qa": 0.5})], list(NAMES))
    teacher = open_teacher(tmp_path, streams, ["qa"])
    with Loader(streams, cursor, global_batch=8, micro_batch=2, teacher=teacher) as loader:
        step = loader.next_step()
    for batch in step.micro_batches:
        assert batch.teacher is not None
        for row, source in enumerate(batch.sources):
            has_targets = NAMES[source] == "qa"
            assert bool(batch.teacher.log_probs[row].any()) == has_targets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ("other", "bb")}, "its ids are of tokenizer aa, this run has other"),
        ({"vocab_size": 299}, "holds ids below 300, model.vocab is 299"),
        ({"documents": DocumentOptions(256, reset_attention=True)}, "documents"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(tmp_path, streams, changes, message) -> None:
    with pytest.raises(RefusedError, match=message):
        open_teacher(tmp_path, streams, **changes)


def test_eod_loss_and_a_larger_vocabulary_fit(tmp_path, streams) -> None:
    open_teacher(tmp_path, streams, documents=DocumentOptions(256, eod_loss=False), vocab_size=400, tokenizer=None)


def test_only_sources_with_a_teacher_must_be_in_the_cache(tmp_path, streams) -> None:
    write_source(tmp_path / "new", stride=5, documents=4)
    streams = [*streams, open_stream(tmp_path, "new")]
    open_teacher(tmp_path, streams)
    with pytest.raises(RefusedError, match="no records of source new"):
        open_teacher(tmp_path, streams, [*NAMES, "new"])


def test_fill_in_middle_is_refused(tmp_path, streams) -> None:
    fim = FillInMiddle(rate=0.5, spm_rate=0.5, prefix_id=297, middle_id=298, suffix_id=299, eod_id=256)
    moved = [open_stream(tmp_path, "web", fim=fim), streams[1]]
    with pytest.raises(UserError, match=r"source web has `fim`.*teacher.sources.web to 0"):
        open_teacher(tmp_path, moved)
    open_teacher(tmp_path, moved, ["qa"])
