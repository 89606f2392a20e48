"""Windows over a file: every position once, with enough context."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data.teacher_cache.window_grid import WindowGrid


def test_the_example_of_the_module() -> None:
    grid = WindowGrid(num_tokens=11, window=4, stride=2)
    windows = range(grid.num_windows)
    assert [grid.reads(index) for index in windows] == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert [grid.gives(index, index + 1) for index in windows] == [(0, 4), (4, 6), (6, 8), (8, 10)]
    assert grid.gives(1, 3) == (4, 8)


@given(num_tokens=st.integers(2, 400), window=st.integers(1, 50), data=st.data())
def test_every_position_is_given_once_by_a_window_that_reads_enough_before_it(num_tokens, window, data) -> None:
    stride = data.draw(st.integers(1, window))
    grid = WindowGrid(num_tokens, window, stride)
    given_positions = []
    for index in range(grid.num_windows):
        first, stop = grid.gives(index, index + 1)
        start, end = grid.reads(index)
        assert start <= first < stop == end
        assert all(position - start >= min(position, window - stride) for position in range(first, stop))
        given_positions += range(first, stop)
    assert given_positions == list(range(num_tokens - 1))


def test_windows_without_overlap_are_the_samples_of_a_file_that_they_fill() -> None:
    grid = WindowGrid(num_tokens=3 * 64 + 1, window=64, stride=64)
    assert [grid.reads(index) for index in range(grid.num_windows)] == [(0, 64), (64, 128), (128, 192)]
