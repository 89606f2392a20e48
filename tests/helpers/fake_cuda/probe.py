"""Small operations on the fake device, whose waits, memory and errors are known."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.helpers.fake_cuda import device
from tests.helpers.fake_cuda.kernels import compiler_for
from tests.helpers.fake_cuda.mode import FakeCuda

MIB = 1 << 20


def run_probe() -> dict[str, Any]:
    """Return the waits of each operation in `_operations`, and what the other probes saw."""
    mode = FakeCuda()
    device.install(mode.note, compiler_for(mode.memory))
    with device.process_group(rank=1, world_size=4), mode:
        return {
            "waits": {name: _waits(mode, operation) for name, operation in _operations().items()},
            "thread": _waits(mode, lambda: _in_thread(mode)),
            "mix": _error(lambda: torch.ones(4, device="cuda") + torch.ones(4)),
            "casts": _casts(mode),
            **_memory(mode),
        }


def _operations() -> dict[str, Callable[[], Any]]:
    on_device = torch.ones(8, 8, device="cuda")
    vector, number = on_device[0], on_device[0, 0]
    host, pinned = torch.ones(8, 8), torch.ones(8, 8).pin_memory()
    mask = on_device > 0
    event = torch.cuda.Event()
    return {
        "item": number.item,
        "float": lambda: float(number),
        "bool": lambda: bool(number > 0),
        "tolist": vector.tolist,
        "tensor of device numbers": lambda: torch.tensor([number, number]),
        "cpu": on_device.cpu,
        "numpy": lambda: on_device.cpu().numpy(),
        "download to pageable memory": lambda: host.copy_(on_device),
        "download, not blocking": lambda: on_device.to("cpu", non_blocking=True),
        "download to pinned memory": lambda: pinned.copy_(on_device, non_blocking=True),
        "upload from pageable memory": lambda: host.to("cuda", non_blocking=True),
        "cuda()": host.cuda,
        "blocking upload from pinned memory": lambda: pinned.to("cuda"),
        "upload from pinned memory": lambda: pinned.to("cuda", non_blocking=True),
        "copy into device memory": lambda: on_device.copy_(pinned, non_blocking=True),
        "torch.tensor": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "torch.full": lambda: torch.full((2,), 1.0, device="cuda"),
        "equal": lambda: torch.equal(on_device, on_device),
        "nonzero": on_device.nonzero,
        "mask as index": lambda: on_device[mask],
        "number under a mask": lambda: on_device.__setitem__(mask, 0.0),
        "values under a mask": lambda: on_device.__setitem__(mask, torch.ones(64, device="cuda")),
        "where": lambda: torch.where(mask, on_device, 0.0),
        "synchronize": torch.cuda.synchronize,
        "event.synchronize": event.synchronize,
        "event.wait": lambda: torch.cuda.current_stream().wait_event(event),
        "all-reduce over NCCL": lambda: dist.all_reduce(vector),
        "all-reduce over gloo": lambda: dist.all_reduce(host),
        "barrier": dist.barrier,
        "no-op": lambda: on_device.to("cuda").cuda().to(torch.float32),
    }


def _waits(mode: FakeCuda, operation: Callable[[], Any]) -> list[str]:
    mode.waits.clear()
    operation()
    return [wait.kind for wait in mode.waits]


def _in_thread(mode: FakeCuda) -> None:
    def work() -> None:
        with mode.for_thread():
            torch.ones(3).cuda()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def _error(operation: Callable[[], Any]) -> str:
    try:
        operation()
    except RuntimeError as error:
        return str(error)
    return ""


def _casts(mode: FakeCuda) -> list[str]:
    mode.casts.clear()
    torch.ones(4, 2, device="cuda").to(torch.bfloat16)
    return [cast.kind for cast in mode.casts]


def _memory(mode: FakeCuda) -> dict[str, Any]:
    """Return bytes that live and peak bytes, in MiB, of a few operations on tensors of 1 MiB."""
    big = torch.zeros(512, 1024, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    gate = lambda x: functional.silu(x) * x  # noqa: E731
    square = torch.compile(lambda x: torch.square(functional.relu(x)))
    add = torch.compile(lambda x, y: x + functional.dropout(y, 0.0))
    heads = {
        name: torch.zeros(1, count, 512, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for name, count in (("query", 8), ("key", 2))
    }
    return {
        "view": _growth(mode, lambda: big.view(-1)[3:]),
        "sum": _growth(mode, lambda: big + 1),
        "freed": _growth(mode, lambda: list((big + 1).shape)),
        "fused, saves its input": _growth(mode, lambda: torch.compile(gate)(big * 2)),
        "not fused": _growth(mode, lambda: gate(big * 2)),
        "fused, saves nothing": _growth(mode, lambda: add(big * 2, big * 3)),
        "attention": _growth(
            mode,
            lambda: functional.scaled_dot_product_attention(
                heads["query"], heads["key"], heads["key"], is_causal=True, enable_gqa=True
            ),
        ),
        "recomputed attention": _recomputed_attention(mode, heads),
        "gradient": _gradient(square, big),
    }


def _growth(mode: FakeCuda, operation: Callable[[], Any]) -> tuple[float, float]:
    mode.memory.reset_peak()
    before = mode.memory.now
    kept = operation()
    grown, peak = mode.memory.now - before, mode.memory.peak - before
    del kept
    return grown / MIB, peak / MIB


def _recomputed_attention(mode: FakeCuda, heads: dict[str, torch.Tensor]) -> float:
    """Return the peak in MiB of a backward pass that computes attention again."""

    def attention(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)

    result = checkpoint(attention, heads["query"], heads["key"], use_reentrant=True, preserve_rng_state=False).sum()
    mode.memory.reset_peak()
    before = mode.memory.now
    result.backward()
    return (mode.memory.peak - before) / MIB


def _gradient(square: Any, big: torch.Tensor) -> list[Any]:
    square(big).sum().backward()
    assert big.grad is not None
    return [list(big.grad.shape), str(big.grad.device), str(big.grad.dtype)]
