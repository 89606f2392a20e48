"""The GPU path on a CUDA device that does not exist: waits of the host, device mixes, memory at full size."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from benchmarks.fake_gpu_memory import row_of
from tests.helpers.fake_cuda import train_on_fake_gpu
from tests.helpers.fake_cuda.device import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="the fake CUDA device needs a C++ compiler")

MAX_WAITS = 2
RANKS = {"first": 0, "middle": 16, "last": 63}
INTERLEAVED = ["parallel.virtual_pipeline=2", "recompute.granularity=full"]


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """A rank of the first, a middle and the last stage of Nemotron-4 15B at TP8 PP4 DP2, and an interleaved layout."""
    cases = [{"rank": rank, "world_size": 64, "micro_batches": 5} for rank in RANKS.values()]
    cases.append({"rank": 0, "world_size": 32, "micro_batches": 4, "overrides": INTERLEAVED})
    return dict(zip([*RANKS, "interleaved"], train_on_fake_gpu(cases), strict=True))


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
    assert reports["first"]["parameters"] == pytest.approx(0.587e9, rel=0.001)
    assert reports["middle"]["parameters"] == pytest.approx(0.390e9, rel=0.001)


def test_a_step_waits_at_most_twice(reports: dict[str, dict[str, Any]]) -> None:
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


@pytest.mark.parametrize("name", ["first", "last", "interleaved"])
def test_the_planner_knows_the_peak_memory(reports: dict[str, dict[str, Any]], name: str) -> None:
    row = row_of(name, reports[name])
    assert abs(row["error"]) < 0.05, row


def test_nothing_of_a_step_stays_on_the_device(reports: dict[str, dict[str, Any]]) -> None:
    for report in reports.values():
        assert report["memory"]["after"] == report["memory"]["before"]
