"""Make torch and megatron-core believe in one H100: a device guard, answers of torch.cuda, and fake process groups."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEMORY = 80 << 30


def compiler() -> str | None:
    """Return the C++ compiler that builds the device guard; None: there is none."""
    return shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


def load_guard() -> None:
    """Compile the device guard and load it before torch."""
    assert "torch" not in sys.modules, "the device guard must be loaded before torch"
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    torch = Path(spec.submodule_search_locations[0])
    build = compiler()
    assert build is not None, "the fake CUDA device needs a C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        command = [build, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}", str(HERE / "guard.cpp")]
        command += ["-o", str(library), f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class FakeStream:
    """A stream or event; only waiting of the host is of interest, and it is recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device_index, self.cuda_stream = 0, 0

    def synchronize(self) -> None:
        _note(f"{type(self).__name__[4:].lower()}.synchronize()")

    def elapsed_time(self, _: Any) -> float:
        return 1.0

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or FakeEvent()

    def record(self, *_: Any) -> None: ...

    wait = wait_stream = wait_event = record

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None: ...


class FakeEvent(FakeStream):
    """An event; see `FakeStream`."""


_note: Callable[[str], None] = lambda _: None  # noqa: E731 (replaced by `install`)


def install(note_wait: Callable[[str], None], compile_function: Callable[..., Any]) -> None:
    """Replace the parts of torch that would talk to a device.

    Args:
        note_wait: called with a description whenever the host waits for the device.
        compile_function: in place of torch.compile.
    """
    import torch
    from torch._subclasses import fake_tensor

    from tests.helpers.fake_cuda.mode import replace_functions

    global _note
    _note = note_wait
    torch._C._ensureCUDADeviceGuardSet()
    # Data of torch.tensor(..., device="cuda") is built on the CPU and then copied, where the copy is seen.
    torch._C._set_only_lift_cpu_tensors(True)
    fake_tensor.init_gpu_context = lambda _: None
    torch.nn.Module._apply = _apply  # type: ignore[assignment, method-assign]
    for name, answer in _answers().items():
        for module in (torch.cuda, torch.cuda.random):
            if hasattr(module, name):
                setattr(module, name, answer)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[assignment, method-assign] # takes only real streams
    fake_tensor.FakeTensor.tolist = _tolist
    replace_functions()
    torch.compile = compile_function
    # One thread: the backward pass has the modes and the call stack of the step.
    torch.autograd.set_multithreading_enabled(False)


def _apply(self: Any, function: Callable[[Any], Any], recurse: bool = True) -> Any:
    """Move a module as torch moves CUDA tensors: it would swap fake parameters instead of setting their data."""
    import torch

    for module in self.modules() if recurse else [self]:
        for parameter in module._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    parameter.data = function(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


def _tolist(self: Any) -> Any:
    """Return zeros as a CUDA tensor returns its values: after one download."""
    import torch

    _note(f"tolist() of {str(self.dtype).removeprefix('torch.')}{list(self.shape)}")
    return torch.zeros(self.shape, dtype=self.dtype).tolist()


def _answers() -> dict[str, Any]:
    import torch

    stream = FakeStream()
    generator = torch.Generator()
    properties = types.SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=MEMORY,
        name="NVIDIA H100 80GB HBM3",
        gcnArchName="",
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "device": lambda *_: contextlib.nullcontext(),
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "synchronize": lambda *_: _note("torch.cuda.synchronize()"),
        "empty_cache": lambda: _note("torch.cuda.empty_cache()"),
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": FakeStream,
        "Event": FakeEvent,
        "is_current_stream_capturing": lambda: False,
        "default_generators": (generator,),
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_, **__: generator.get_state(),
        "set_rng_state": lambda *_, **__: None,
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_stats": lambda *_: {},
        **{f"{name}Tensor": _tensor_class(dtype) for name, dtype in _tensor_types().items()},
    }


def _tensor_types() -> dict[str, Any]:
    import torch

    return {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Int": torch.int32,
        "Long": torch.int64,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }


def _tensor_class(dtype: Any) -> type:
    """Return a stand-in for torch.cuda.FloatTensor and its kind, which checks instances and makes tensors."""
    import torch

    class Kind(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, torch.Tensor) and value.is_cuda and value.dtype == dtype

        def __call__(cls, data: Any) -> Any:
            return torch.tensor(data, dtype=dtype, device="cuda")

    return Kind("CudaTensor", (), {})


@contextlib.contextmanager
def process_group(rank: int, world_size: int) -> Iterator[None]:
    """Process group of one rank among `world_size` that exist only by name; every new group is fake, too."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = distributed_c10d.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pg_options", None)
        return new_group(*args, **{**kwargs, "backend": "fake"})

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    dist.new_group = distributed_c10d.new_group = fake_group
    try:
        yield
    finally:
        dist.new_group = distributed_c10d.new_group = new_group
        dist.destroy_process_group()
