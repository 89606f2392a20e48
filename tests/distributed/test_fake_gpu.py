"""The GPU path on a CUDA device that does not exist: waits of the host, device mixes, memory at full size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.fake_gpu_memory import row_of
from tests.helpers.fake_cuda import train_on_fake_gpu
from tests.helpers.fake_cuda.device import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="the fake CUDA device needs a C++ compiler")

MAX_WAITS = 2
RANKS = {"first": 0, "middle": 16, "last": 63}
INTERLEAVED = ["parallel.virtual_pipeline=2", "recompute.granularity=full"]


def _train(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Train on ranks of Nemotron-4 15B at TP8 PP4 DP2, or on the first stage of an interleaved layout."""
    cases = [
        {"rank": RANKS[name], "world_size": 64, "micro_batches": 5}
        if name in RANKS
        else {"rank": 0, "world_size": 32, "micro_batches": 4, "overrides": INTERLEAVED}
        for name in names
    ]
    return dict(zip(names, train_on_fake_gpu(cases), strict=True))


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """The last stage, and an interleaved layout."""
    return _train(["last", "interleaved"])


def test_the_default_knobs_of_a_gpu_are_on(reports: dict[str, dict[str, Any]]) -> None:
    for report in reports.values():
        assert report["devices"] == ["cuda:0"]
        assert {
            "fused_activation",
            "fused_bias_dropout",
            "fused_cross_entropy",
            "fused_grad_accumulation",
            "overlap_grad_reduce",
            "overlap_param_gather",
        } <= set(report["knobs"])
    # 32 layers in 4 stages, an eighth of every matrix; the first and the last stage have a table of token ids.
    assert reports["last"]["parameters"] == pytest.approx(0.587e9, rel=0.001)


@pytest.mark.long
def test_other_stages_wait_at_most_twice_and_have_the_planned_size() -> None:
    reports = _train(["first", "middle"])
    assert reports["first"]["parameters"] == pytest.approx(0.587e9, rel=0.001)
    assert reports["middle"]["parameters"] == pytest.approx(0.390e9, rel=0.001)
    _assert_few_waits(reports)
    row = row_of("first", reports["first"])
    assert abs(row["error"]) < 0.05, row


def test_a_step_waits_at_most_twice(reports: dict[str, dict[str, Any]]) -> None:
    _assert_few_waits(reports)


def _assert_few_waits(reports: dict[str, dict[str, Any]]) -> None:
    for name, report in reports.items():
        waits = [f"{wait['kind']} at {wait['place']} ({wait['caller']})" for wait in report["waits"]]
        assert len(waits) <= MAX_WAITS, f"{name} stage: {len(waits)} waits: {Counter(waits).most_common()}"


def test_the_loader_uploads_from_pinned_memory(reports: dict[str, dict[str, Any]]) -> None:
    for report in reports.values():
        assert report["upload_waits"] == []


def test_only_the_loss_converts_large_tensors(reports: dict[str, dict[str, Any]]) -> None:
    """A conversion of a tensor as large as one layer's output costs time and memory that nobody asked for."""
    for report in reports.values():
        large = {cast for cast in report["casts"] if _elements(cast) >= 4096 * 6144 // 8}
        assert all("cross_entropy.py" in cast for cast in large), large


def _elements(cast: str) -> int:
    """Return the elements of a cast such as `bfloat16[4096, 1, 32000] to float32 at FILE:LINE`."""
    product = 1
    for size in filter(None, cast.partition("[")[2].partition("]")[0].split(", ")):
        product *= int(size)
    return product


@pytest.mark.parametrize("name", ["last", "interleaved"])
def test_the_planner_knows_the_peak_memory(reports: dict[str, dict[str, Any]], name: str) -> None:
    row = row_of(name, reports[name])
    assert abs(row["error"]) < 0.05, row


def test_nothing_of_a_step_stays_on_the_device(reports: dict[str, dict[str, Any]]) -> None:
    for report in reports.values():
        assert report["memory"]["after"] == report["memory"]["before"]
