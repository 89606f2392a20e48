"""Rows hold every sequence, and a token sees its own sequence's past only."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.evaluate import token_tree
from megatron_cpt.evaluate.token_tree import RowSegment, TokenRow, pack_rows, segments_of

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=12)


def visible(row: TokenRow, index: int) -> list[int]:
    """Return the indices that a token attends to, by the rule in the module's docstring."""
    return [other for other in range(len(row)) if other <= index < row.ends[other]]


@given(sequences, st.integers(1, 12), st.integers(1, 4))
def test_each_token_sees_the_past_of_its_sequence(texts: list[tuple[int, ...]], budget: int, multiple: int) -> None:
    rows = pack_rows(texts, budget=budget, multiple=multiple)
    assert sorted(number for row in rows for number in row.paths) == list(range(len(texts)))
    for row in rows:
        assert len(row) % multiple == 0
        assert row.num_tokens <= budget or len(row.paths) == 1
        for number, path in row.paths.items():
            assert tuple(row.tokens[path]) == texts[number]
            assert row.positions[path].tolist() == list(range(len(path)))
            for position, index in enumerate(path):
                assert visible(row, index) == path[: position + 1].tolist()
        for index in range(row.num_tokens, len(row)):
            assert visible(row, index) == [index], "padding sees itself, so its softmax is not over nothing"


@given(sequences, st.randoms(use_true_random=False))
def test_rows_do_not_depend_on_the_order(texts: list[tuple[int, ...]], shuffle: random.Random) -> None:
    shuffled = texts.copy()
    shuffle.shuffle(shuffled)
    for row, other in zip(*(pack_rows(some, budget=8, multiple=4) for some in (texts, shuffled)), strict=True):
        assert np.array_equal(row.tokens, other.tokens)
        assert np.array_equal(row.ends, other.ends)


def test_a_shared_prefix_is_stored_once() -> None:
    shots = tuple(range(100))
    texts = [(*shots, question, answer) for question in (200, 201) for answer in (1, 2, 3, 4)]
    (row,) = pack_rows(texts, budget=512, multiple=1)
    assert len(row) == 100 + 2 * (1 + 4)


def test_padding_is_under_five_percent() -> None:
    draw = random.Random(0)
    contexts = [tuple(draw.randrange(9999) for _ in range(draw.randrange(10, 120))) for _ in range(100)]
    texts = [(*context, *(draw.randrange(9999) for _ in range(draw.randrange(1, 20)))) for context in contexts * 2]
    rows = pack_rows(texts, budget=512, multiple=16)
    assert sum(len(row) - row.num_tokens for row in rows) < 0.05 * sum(map(len, rows))
    assert len({len(row) for row in rows}) <= 512 / 16


@given(sequences, st.integers(1, 5))
def test_segments_see_what_the_row_sees(texts: list[tuple[int, ...]], size: int) -> None:
    (row,) = pack_rows(texts, budget=1000, multiple=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_tree, "_SEGMENT", size)
        segments = segments_of(row.ends)
    assert [token for segment in segments for token in range(segment.start, segment.stop)] == list(range(len(row)))
    for segment in segments:
        before = [token for part in segment.prefix for token in part]
        for index in range(segment.start, segment.stop):
            seen = [*before, *(token for token in visible(row, index) if token >= segment.start)]
            assert seen == visible(row, index)


def test_a_long_prefix_is_a_segment_of_its_own() -> None:
    shots = tuple(range(300))
    texts = [shots + (400 + number,) * 100 for number in range(4)]
    (row,) = pack_rows([*texts, (1000,) * 20], budget=4096, multiple=1)
    prefix = (range(300),)
    assert segments_of(row.ends) == [
        RowSegment((), 0, 300),
        RowSegment(prefix, 300, 500),
        RowSegment(prefix, 500, 700),
        RowSegment((), 700, 720),
    ]


def test_few_logits_are_needed_per_row() -> None:
    texts = [(number,) * 400 for number in range(4)]
    assert len(pack_rows(texts, budget=4096, multiple=1)) == 1
    assert [len(row.paths) for row in pack_rows(texts, budget=4096, multiple=1, needed=[200, 200, 200, 400])] == [
        2,
        1,
        1,
    ]
