"""The fake CUDA device itself: it must see every wait, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.fake_cuda import run_probe
from tests.helpers.fake_cuda.device import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="the fake CUDA device needs a C++ compiler")

WAITS = {
    "item": ["item() of float32[]"],
    "float": ["item() of float32[]"],
    "bool": ["item() of bool[]"],
    "tolist": ["tolist() of float32[8]"],
    "tensor of device numbers": ["item() of float32[]", "item() of float32[]"],
    "cpu": ["download float32[8, 8], pageable memory"],
    "numpy": ["download float32[8, 8], pageable memory"],
    "download to pageable memory": ["download float32[8, 8], pageable memory"],
    "download, not blocking": [],
    "download to pinned memory": [],
    "upload from pageable memory": ["upload float32[8, 8], pageable memory"],
    "cuda()": ["upload float32[8, 8], pageable memory"],
    "blocking upload from pinned memory": ["upload float32[8, 8], not non_blocking"],
    "upload from pinned memory": [],
    "copy into device memory": [],
    "torch.tensor": ["upload float32[2], pageable memory"],
    "torch.full": [],
    "equal": ["equal() of float32[8, 8]"],
    "nonzero": ["nonzero of float32[8, 8]"],
    "mask as index": ["index with a mask bool[8, 8]"],
    "number under a mask": [],
    "values under a mask": ["index_put with a mask bool[8, 8]"],
    "where": [],
    "synchronize": ["torch.cuda.synchronize()"],
    "event.synchronize": ["event.synchronize()"],
    "event.wait": [],
    "all-reduce over NCCL": [],
    "all-reduce over gloo": ["collective over gloo: allreduce"],
    "barrier": ["barrier()"],
    "no-op": [],
}


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    return run_probe()


def test_waits_of_the_host_are_seen_and_no_others(probe: dict[str, Any]) -> None:
    assert probe["waits"] == WAITS
    assert probe["thread"] == ["upload float32[3], pageable memory"]


def test_operands_on_two_devices_are_an_error(probe: dict[str, Any]) -> None:
    assert "cuda:0 and cpu" in probe["mix"]


def test_conversions_are_seen(probe: dict[str, Any]) -> None:
    assert probe["casts"] == ["float32[4, 2] to bfloat16"]


@pytest.mark.parametrize(
    ("operation", "grown", "peak"),
    [
        ("view", 0, 0),
        ("sum", 1, 1),
        ("freed", 0, 1),
        ("not fused", 3, 3),  # input, activated input, product
        ("fused, saves its input", 2, 2),
        ("fused, saves nothing", 1, 3),  # two inputs live until the sum is there
    ],
)
def test_memory_of_tensors_of_1_mib(probe: dict[str, Any], operation: str, grown: float, peak: float) -> None:
    assert probe[operation] == [grown, peak]


def test_attention_keeps_its_output_and_row_sums_but_no_scores(probe: dict[str, Any]) -> None:
    output, row_sums = 2 * 8 * 512 * 64, 4 * 8 * 512
    grown, _ = probe["attention"]
    assert grown == pytest.approx((output + row_sums) / 2**20, abs=2 * 512 / 2**20)


def test_attention_in_the_backward_pass_keeps_no_scores(probe: dict[str, Any]) -> None:
    scores = 4 * 8 * 512 * 512 / 2**20
    assert probe["recomputed attention"] < scores


def test_a_fused_function_has_gradients(probe: dict[str, Any]) -> None:
    assert probe["gradient"] == [[512, 1024], "cuda:0", "torch.bfloat16"]
