"""In place of torch.compile: a function becomes one kernel, which allocates and saves what a fused kernel does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tests.helpers.fake_cuda.memory import DeviceMemory


def compiler_for(memory: DeviceMemory) -> Callable[..., Any]:
    """Return a replacement of torch.compile whose temporaries do not count as device memory."""

    def compile_function(function: Any = None, **_: Any) -> Any:
        if function is None:
            return compile_function

        def kernel(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
                return _FusedKernel.apply(function, memory, leaves, structure, *tensors)
            with memory.hidden():
                result = function(*args, **kwargs)
            memory.add(result, f"fused {function.__name__}")
            return result

        return kernel

    return compile_function


def _call(function: Any, leaves: Sequence[Any], structure: Any, tensors: Sequence[torch.Tensor]) -> Any:
    replaced = iter(tensors)
    filled = [next(replaced) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(filled, structure)
    return function(*args, **kwargs)


class _FusedKernel(torch.autograd.Function):
    """Function of several operators, with one result, whose backward pass recomputes what it needs.

    Inductor's partitioner recomputes pointwise operators: it saves the inputs that the gradient depends on, and nothing
    if the gradient depends on none (a sum).
    """

    @staticmethod
    def forward(ctx: Any, function: Any, memory: DeviceMemory, leaves: Any, structure: Any, *tensors: Any) -> Any:
        own = {tensor.untyped_storage()._cdata: index for index, tensor in enumerate(tensors)}
        needed: set[int] = set()

        def note(saved: torch.Tensor) -> None:
            index = own.get(saved.untyped_storage()._cdata)
            needed.update(range(len(tensors)) if index is None else [index])

        with memory.hidden(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda _: None):
            inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
            result = _call(function, leaves, structure, inputs)
        assert isinstance(result, torch.Tensor), f"{function}: one result is expected"
        ctx.call = (function, memory, [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure)
        ctx.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        ctx.like = [(tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for tensor in tensors]
        ctx.needed = sorted(needed)
        ctx.save_for_backward(*(tensors[index] for index in ctx.needed))
        result = result.detach()
        memory.add(result, f"fused {function.__name__}")
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        function, memory, leaves, structure = ctx.call
        saved = dict(zip(ctx.needed, ctx.saved_tensors, strict=True))
        with memory.hidden(), torch.enable_grad():
            tensors = [
                (saved[index].detach() if index in saved else torch.empty(shape, dtype=dtype, device=device))
                for index, (shape, dtype, device, _) in enumerate(ctx.like)
            ]
            for tensor, (*_, requires_grad) in zip(tensors, ctx.like, strict=True):
                tensor.requires_grad_(requires_grad)
            marked = [
                torch.empty(0) if is_tensor else leaf for leaf, is_tensor in zip(leaves, ctx.is_tensor, strict=True)
            ]
            result = _call(function, marked, structure, tensors)
            wanted = [tensor for tensor in tensors if tensor.requires_grad]
            found = iter(torch.autograd.grad(result, wanted, gradients[0], allow_unused=True))
        results = [next(found) if tensor.requires_grad else None for tensor in tensors]
        memory.add(tree_leaves(results), f"fused backward {function.__name__}")
        return None, None, None, None, *results
