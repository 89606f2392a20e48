"""Pipelines of unequal depth: the time of their passes, and the layers that balance them."""

from __future__ import annotations

import pytest

from megatron_cpt.planning.cluster.pipeline_schedule import balance, balanced_layout, schedule_seconds


def chunks_of(layout: list[int], stages: int, head: float) -> list[list[float]]:
    """Return the time of every stage's chunks, with one second per layer."""
    seconds = [[float(layers) for layers in layout[stage::stages]] for stage in range(stages)]
    seconds[-1][-1] += head
    return seconds


@pytest.mark.parametrize("num_micro_batches", [1, 4, 6, 40, 41])
def test_equal_stages_take_as_long_as_the_formula_says(num_micro_batches):
    """(m + p - 1) t under 1F1B (Narayanan et al., arXiv 2104.04473)."""
    assert schedule_seconds([[3.0]] * 4, num_micro_batches) == pytest.approx((num_micro_batches + 3) * 3)


@pytest.mark.parametrize("num_micro_batches", [4, 8, 40])
def test_chunks_shorten_the_bubble(num_micro_batches):
    """(m + (p - 1) / v) t with v chunks per stage."""
    assert schedule_seconds([[2.0, 2.0]] * 4, num_micro_batches) == pytest.approx((num_micro_batches + 3 / 2) * 4)


def test_the_slowest_stage_sets_the_pace():
    assert schedule_seconds([[1.0], [1.0], [1.0], [3.0]], 20) == pytest.approx(20 * 3 + 3)


def test_a_single_micro_batch_passes_every_chunk_in_turn():
    seconds = chunks_of([3, 1, 2, 0], 2, 5.0)
    assert schedule_seconds(seconds, 2) >= 3 + 1 + 2 + 0 + 5
    assert schedule_seconds([[3.0], [1.0], [7.0]], 1) == pytest.approx(11)


def test_chunks_that_run_at_the_same_time_wait_for_the_longest():
    """Both layouts have stages of 9, 9, 9 and 9 seconds; in the second one the long chunks are not aligned."""
    aligned = schedule_seconds(chunks_of([5, 5, 5, 5, 4, 4, 4, 0], 4, 4.0), 72)
    crossed = schedule_seconds(chunks_of([6, 3, 6, 3, 3, 6, 3, 2], 4, 4.0), 72)
    assert aligned < 1.03 * 72 * 9
    assert crossed > 1.05 * aligned


def test_layers_go_to_the_lightest_part():
    assert balance(32, [0, 0, 0, 4]) == [9, 9, 9, 5]
    assert balance(3, [0, 0]) == [1, 2]  # the last stage keeps fewer micro-batches in flight
    assert balance(4, [0, 9]) == [4, 0]
    assert balance(0, [0, 0]) == [0, 0]


@pytest.mark.parametrize("layers", [24, 31, 61, 96])
@pytest.mark.parametrize(("stages", "virtual"), [(2, 1), (2, 4), (4, 1), (4, 2), (8, 2)])
@pytest.mark.parametrize("head", [0.0, 1.3, 4.0])
def test_no_other_layer_count_of_the_last_stage_is_better(layers, stages, virtual, head):
    layout = balanced_layout(layers, stages, virtual, head)
    assert len(layout) == stages * virtual
    assert sum(layout) == layers
    longest = max(sum(chunks) for chunks in chunks_of(layout, stages, head))
    # any number of layers on the last stage, and the others shared as equally as possible
    choices = range(layers + 1)
    best = min(max(last + head, -(-(layers - last) // (stages - 1))) for last in choices)
    assert longest == pytest.approx(best)
