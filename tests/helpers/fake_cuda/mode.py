"""Dispatch mode: tensors on "cuda" are fake, tensors on the CPU are real, and every wait of the host is noted."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.fake_cuda.memory import DeviceMemory

REPOSITORY = Path(__file__).parents[3]
_OWN = (f"{REPOSITORY / 'megatron_cpt'}/", "/megatron/core/")
aten = torch.ops.aten


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the device, or where the device idles while the host communicates.

    Attributes:
        kind: operation with dtype and shape.
        place: file and line of this package or of megatron-core.
        caller: file and line of this package, if `place` is in megatron-core.
    """

    kind: str
    place: str
    caller: str


@dataclass(frozen=True)
class Cast:
    """A copy of a tensor on the device in another dtype."""

    kind: str
    place: str


class FakeCuda(TorchDispatchMode):
    """Mode of one thread; `for_thread` gives the mode of another thread on the same device.

    Operators whose tensors are on the CPU run for real. Results on the device are fake: they have a shape, a dtype and
    a storage of the true size, but no values. A copy to the host gives zeros.
    """

    def __init__(self, parent: FakeCuda | None = None) -> None:
        super().__init__()
        self.fake = parent.fake if parent else FakeTensorMode(allow_non_fake_inputs=True)
        self.memory = parent.memory if parent else DeviceMemory()
        self.waits: list[Wait] = parent.waits if parent else []
        self.casts: list[Cast] = parent.casts if parent else []
        self._pinned: dict[int, Any] = parent._pinned if parent else {}
        self._lock = parent._lock if parent else threading.RLock()

    def for_thread(self) -> FakeCuda:
        """Return the mode of another thread, with the same device and the same lists."""
        return FakeCuda(self)

    def note(self, kind: str) -> None:
        """Note that the host waits here."""
        self.waits.append(Wait(kind, *_places()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = kwargs.get("device")
        is_on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        with self._lock:
            if not is_on_device and (target is None or target.type == "cpu"):
                return self._on_host(func, tensors, args, kwargs)
            special = _collective if func.namespace == "c10d" else _SPECIAL.get(func)
            result = special(self, func, tensors, args, kwargs) if special else self.run(func, args, kwargs)
            if func.namespace != "prim":
                self.memory.add(result, func.name())
            return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on fake tensors; raises if operands are on different devices."""
        with self.fake:
            return func(*args, **kwargs)

    def _on_host(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        if func.namespace == "c10d":
            name = func.name().partition("::")[2].strip("_")
            self.note("barrier()" if name == "barrier" else f"collective over gloo: {name}")
        if func is aten.is_pinned.default:
            return tensors[0].untyped_storage()._cdata in self._pinned
        if func is aten._pin_memory.default:
            return self._pin(tensors[0].clone())
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        # Kept alive, so that no later storage gets the same address.
        self._pinned[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return True if a tensor of the host is in pinned memory."""
        return tensor.untyped_storage()._cdata in self._pinned

    def note_copy(self, source: torch.Tensor, target_is_device: bool, host_is_pinned: bool, non_blocking: bool) -> None:
        """Note a copy between host and device unless it is asynchronous."""
        if not (non_blocking and host_is_pinned):
            why = "not non_blocking" if host_is_pinned else "pageable memory"
            direction = "upload" if target_is_device else "download"
            self.note(f"{direction} {_describe(source)}, {why}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _places() -> tuple[str, str]:
    """Return file:line of the innermost frame of the package or megatron-core, and of the package."""
    frame = sys._getframe(2)
    found = []
    while frame is not None:
        file = frame.f_code.co_filename
        if any(own in file for own in _OWN):
            short = "megatron_cpt/" + file.partition("/megatron_cpt/")[2] if _OWN[0] in file else file
            short = "megatron/core/" + short.partition("/megatron/core/")[2] if "/megatron/core/" in short else short
            found.append(f"{short}:{frame.f_lineno}")
            if short.startswith("megatron_cpt/"):
                break
        frame = frame.f_back
    return (found[0], found[-1]) if found else ("?", "?")


# --- operators that need more than a fake kernel


def _collective(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    """Return the first argument, into which the others have "sent", and a finished work."""
    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)


def _item(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    mode.note(f"item() of {_describe(args[0])}")
    return True if args[0].dtype == torch.bool else 0.0 if args[0].dtype.is_floating_point else 0


def _to_copy(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    source, target = args[0], kwargs.get("device") or args[0].device
    dtype, non_blocking = kwargs.get("dtype") or source.dtype, kwargs.get("non_blocking", False)
    if source.device.type == target.type:
        if dtype != source.dtype:
            kind = f"{_describe(source)} to {str(dtype).removeprefix('torch.')}"
            mode.casts.append(Cast(kind, _places()[0]))
        return mode.run(func, args, kwargs)
    if target.type == "cpu":
        # torch allocates pinned memory for the result of a non-blocking copy to the host
        mode.note_copy(source, False, non_blocking, non_blocking)
        return torch.zeros(source.shape, dtype=dtype)
    mode.note_copy(source, True, mode.is_pinned(source), non_blocking)
    return mode.run(aten.empty_strided.default, (source.shape, source.stride()), {"dtype": dtype, "device": target})


def _copy(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if target.device.type == source.device.type:
        return mode.run(func, args, kwargs)
    non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    host = source if target.device.type == "cuda" else target
    mode.note_copy(source, target.device.type == "cuda", mode.is_pinned(host), non_blocking)
    return target


def _equal(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    mode.note(f"equal() of {_describe(args[0])}")
    return args[0].shape == args[1].shape


def _add_product(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    """Return the buffer of the product with an fp32 output, which has a kernel on CUDA only."""
    return kwargs["out"]


def _nonzero(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    mode.note(f"nonzero of {_describe(args[0])}")
    return mode.run(aten.new_empty.default, (args[0], (args[0].numel(), args[0].dim())), {"dtype": torch.int64})


def _masked_select(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    mode.note(f"masked_select of {_describe(args[0])}")
    return mode.run(aten.new_empty.default, (args[0], (args[0].numel(),)), {})


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _index(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    source, indices = args[0], args[1]
    for index in indices:
        if index is not None and index.device.type == "cpu":
            mode.note(f"index in pageable memory {_describe(index)}")
    if not any(_is_mask(index) for index in indices):
        return mode.run(func, args, kwargs)
    (mask,) = indices  # the only use in the code under test
    mode.note(f"index with a mask {_describe(mask)}")
    return mode.run(aten.new_empty.default, (source, (mask.numel(), *source.shape[mask.dim() :])), {})


def _index_put(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    # A mask with a number becomes masked_fill; any other value needs the number of true elements.
    value = args[2]
    masks = [index for index in args[1] if _is_mask(index)]
    if masks and not (value.numel() == 1 and value.device.type == "cpu"):
        mode.note(f"index_put with a mask {_describe(masks[0])}")
    return mode.run(func, args, kwargs)


def _flash_backward(mode: FakeCuda, func: Any, tensors: Any, args: Any, kwargs: Any) -> Any:
    """Count the buffers of FlashAttention 2's backward kernel too (csrc/flash_attn/flash_api.cpp, `mha_bwd`)."""
    result = mode.run(func, args, kwargs)
    query, key = args[1], args[2]
    batch, heads, length, size = query.shape
    rows = -(-length // 128) * 128
    workspace = 4 * batch * heads * rows * (size + 1)  # gradient of the queries and row sums, in fp32
    if key.shape[1] != heads:  # gradients of keys and values for every query head, summed over the group afterwards
        workspace += 2 * key.element_size() * batch * heads * key.shape[2] * size
    mode.memory.add_workspace(workspace + sum(_bytes(gradient) for gradient in result))
    return result


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _item,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.equal.default: _equal,
    aten.addmm.dtype_out: _add_product,
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: _index,
    aten.index_put_.default: _index_put,
    aten._index_put_impl_.default: _index_put,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
}


def replace_functions() -> None:
    """Replace functions that read values without an operator, and attention, whose kernel depends on the device.

    A mode of torch functions would not do: it is off in the backward pass, where layers are recomputed.
    """
    tensor, attention = torch.tensor, functional.scaled_dot_product_attention

    def tensor_of_numbers(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(data, torch.Tensor) and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(data)):
            data = _as_numbers(data)
        return tensor(data, *args, **kwargs)

    def attention_on_device(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (_attention if isinstance(query, FakeTensor) else attention)(query, *args, **kwargs)

    torch.tensor = tensor_of_numbers
    functional.scaled_dot_product_attention = attention_on_device


def _as_numbers(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return [_as_numbers(entry) for entry in data]
    return data.item() if isinstance(data, torch.Tensor) else data


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Call a kernel that keeps what torch's choice on an H100 keeps (ATen/native/transformers/cuda/sdp_utils.cpp).

    FlashAttention takes half precision without a mask, also for groups of query heads. torch 2.13 prefers cuDNN's
    kernel with a cuDNN above 9.15, which also keeps the output and one fp32 row sum per query. The memory-efficient
    kernel takes a mask and fp32, but no groups; else torch computes attention from single operators.
    """
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    has_groups = query.shape[1] != key.shape[1]
    if attn_mask is None and is_half and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    if has_groups:
        assert enable_gqa
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
    bias = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -1e9)
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]
