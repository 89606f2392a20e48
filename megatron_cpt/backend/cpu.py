"""Run megatron-core on a CPU over gloo. This is the only module that changes torch for the whole process.

megatron-core uses CUDA without checking that it exists. `install` makes the CPU answer instead, so the code that runs
on H100s (parallel state, pipeline schedules, DDP, the distributed optimizer, dist_checkpointing) also runs, and is
tested, on a laptop. On a machine with CUDA `install` changes nothing.

| patch | reason |
| --- | --- |
| functions and classes of `torch.cuda` (`_CUDA_FUNCTIONS`) | megatron-core calls them; all have an answer on a CPU |
| `torch.cuda.FloatTensor` and the other types | megatron-core creates tensors with these classes |
| `torch.cuda.nvtx.range_push`, `range_pop` | they raise without CUDA; a CPU has no NVTX ranges |
| `CpuForCuda`, a `TorchFunctionMode` of this thread | the CPU replaces `device="cuda"` and `Tensor.cuda()` |
| the same mode, `Tensor.type()` | optimizer/clip_grads.py looks for names such as `torch.cuda.FloatTensor` |
| `sys.modules` of transformer_engine, apex, amp_C | megatron-core prefers their CUDA kernels wherever they import |
| `torch.compile`, only while megatron-core is imported | it compiles fused kernels that no CPU run calls, for seconds |
| random state accessors of megatron-core's tensor_parallel/random.py | they bypass `torch.cuda` |

One name more is replaced elsewhere, on any machine without Apex and Transformer Engine: megatron-core's optimizer takes
`optim/group_step_adam.py` for FusedAdam, because torch's Adam has another layout of its state.

`torch.cuda.is_available()` stays False: code that checks gets the true answer.
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


class _InOrderStream:
    """A stream or event of a device that runs all operations in order, so that waiting does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    wait = synchronize = wait_stream = wait_event = record

    def record_event(self, event: Any = None) -> Any:
        return event or _InOrderStream()

    def query(self) -> bool:
        return True


def _asks_for_cuda(device: Any) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )


class CpuForCuda(TorchFunctionMode):
    """Replace a CUDA device by the CPU in the arguments of torch calls."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            if _asks_for_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1:
            # optimizer/clip_grads.py and distrib_optimizer.py compare with 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.to and _asks_for_cuda(args[1]):
            return func(args[0], CPU, *args[2:])
        return func(*args)


def unchanged_calls() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `CpuForCuda` does not look at torch calls; for code that names no CUDA device.

    The mode costs about 2 µs per call: a training step of a small model is 8 % faster with its forward pass in here.
    """
    return contextlib.nullcontext() if _mode is None else torch._C.DisableTorchFunction()


def _device_properties(*_: Any) -> types.SimpleNamespace:
    names = {"name": "cpu", "gcnArchName": "cpu"}  # torch.compile reads the second on a torch without CUDA
    return types.SimpleNamespace(major=0, minor=0, multi_processor_count=1, total_memory=0, **names)


_CUDA_FUNCTIONS: dict[str, Any] = {
    "current_device": lambda: CPU,
    "set_device": lambda *_: None,
    "device_count": lambda: 1,
    "get_device_properties": _device_properties,
    "get_device_capability": lambda *_: (0, 0),
    "synchronize": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "current_stream": _InOrderStream,
    "default_stream": _InOrderStream,
    "Stream": _InOrderStream,
    "Event": _InOrderStream,
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

_CUDA_LIBRARIES = ("transformer_engine", "apex", "amp_C")

_mode: CpuForCuda | None = None


def install() -> bool:
    """Apply the patches of the module's table; call this before importing megatron-core.

    Returns:
        False if CUDA is available, so that nothing was changed.
    """
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is None:
        for name, replacement in _CUDA_FUNCTIONS.items():
            setattr(torch.cuda, name, replacement)
        for name in _TENSOR_TYPES:
            setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
        torch.cuda.nvtx.range_push = lambda *_: None
        torch.cuda.nvtx.range_pop = lambda *_: None
        for name in _CUDA_LIBRARIES:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # later imports raise ImportError
        _mode = CpuForCuda()
        _mode.__enter__()  # type: ignore[no-untyped-call]  # stays active until the process ends
        _import_megatron_core()
        _replace_rng_accessors()
    return True


def _import_megatron_core() -> None:
    """Import megatron-core, which reads torch.cuda and compiles its fused kernels at import."""
    torch_compile = torch.compile
    torch.compile = _return_uncompiled  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing Apex and Transformer Engine
            import megatron.core.models.gpt  # noqa: F401
    finally:
        torch.compile = torch_compile


def _return_uncompiled(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _return_uncompiled


def _replace_rng_accessors() -> None:
    import megatron.core.tensor_parallel.random as mcore_random

    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda new_state, *_, **__: torch.set_rng_state(new_state)
