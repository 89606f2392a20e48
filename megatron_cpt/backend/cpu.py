"""megatron-core on a CPU, over gloo.

megatron-core asks for CUDA without asking whether it is there: it calls functions of `torch.cuda`, makes tensors with
`device="cuda"`, calls `Tensor.cuda()` and compares `Tensor.type()` with the names of CUDA types. `install` answers all
of these with the CPU, so that the very code that runs on H100s (parallel state, pipeline schedules, DDP, the
distributed optimizer, dist_checkpointing) also runs, and is tested, on a laptop. It does nothing where CUDA is present.

What is replaced:

1. functions and names of `torch.cuda` that need no device to have an honest answer (a stream is always in order, memory
   is always synchronized, the random state is the CPU's);
2. requests for a CUDA device inside torch calls, by a `TorchFunctionMode` that is active in this thread;
3. the two accessors of the random state in megatron-core's tensor_parallel/random.py, which go below `torch.cuda`;
4. `torch.compile`, only while megatron-core is imported: it decorates its fused kernels with it, and loading the
   compiler for kernels that a CPU run never calls costs each process seconds.

`torch.cuda.is_available()` stays False: code that does ask gets the truth.
"""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _InOrder:
    """A stream or an event of a device that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _InOrder()

    def query(self) -> bool:
        return True


def _asks_for_cuda(device: Any) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


class CpuForCuda(TorchFunctionMode):
    """Sends to the CPU what is asked of a CUDA device inside torch calls."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            if _asks_for_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1:
            # optimizer/clip_grads.py and distrib_optimizer.py know their tensors by 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to and _asks_for_cuda(args[1]):
            return func(args[0], CPU, *args[2:])
        return func(*args)


def _device_properties(*_: Any) -> types.SimpleNamespace:
    # torch.compile asks a torch without CUDA for the second name
    names = {"name": "cpu", "gcnArchName": "cpu"}
    return types.SimpleNamespace(major=0, minor=0, multi_processor_count=1, total_memory=0, **names)


_ANSWERS: dict[str, Any] = {
    "current_device": lambda: CPU,
    "set_device": lambda *_: None,
    "device_count": lambda: 1,
    "get_device_properties": _device_properties,
    "get_device_capability": lambda *_: (0, 0),
    "synchronize": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "current_stream": _InOrder,
    "default_stream": _InOrder,
    "Stream": _InOrder,
    "Event": _InOrder,
    "stream": lambda _: contextlib.nullcontext(),
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    "manual_seed": torch.manual_seed,
    "memory_allocated": lambda *_: 0,
    "memory_reserved": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "max_memory_reserved": lambda *_: 0,
    "reset_peak_memory_stats": lambda *_: None,
    "memory_stats": lambda *_: {},
}

_TENSOR_TYPES = ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")

# CUDA kernels that megatron-core takes for its optimizer and layers wherever they can be imported.
_CUDA_LIBRARIES = ("transformer_engine", "apex", "amp_C")

_mode: CpuForCuda | None = None


def install() -> bool:
    """Make megatron-core run on this CPU; call it before megatron-core is imported.

    Returns:
        True where the CPU now stands in, False where CUDA is present and nothing was touched.
    """
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is None:
        for name, answer in _ANSWERS.items():
            setattr(torch.cuda, name, answer)
        for name in _TENSOR_TYPES:
            setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
        torch.cuda.nvtx.range_push = lambda *_: None
        torch.cuda.nvtx.range_pop = lambda *_: None
        for name in _CUDA_LIBRARIES:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # an import of it is an ImportError from here on
        _mode = CpuForCuda()
        _mode.__enter__()  # type: ignore[no-untyped-call]  # for the life of the process
        _import_megatron_core()
        _replace_rng_accessors()
    return True


def _import_megatron_core() -> None:
    """Import it now: it reads torch.cuda and decorates its kernels when it is imported."""
    torch_compile = torch.compile
    torch.compile = _leave_uncompiled  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Apex and Transformer Engine are not missed on a CPU
            import megatron.core.models.gpt  # noqa: F401
    finally:
        torch.compile = torch_compile


def _leave_uncompiled(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _leave_uncompiled


def _replace_rng_accessors() -> None:
    import megatron.core.tensor_parallel.random as mcore_random

    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda new_state, *_, **__: torch.set_rng_state(new_state)
