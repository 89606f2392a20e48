"""Measure the memory that one training step allocates on each rank."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_cpt.config import RunConfig, draft_config


class LiveStorages(TorchDispatchMode):
    """Current and peak bytes of the storages that torch operations create.

    Earlier storages are not counted. A view counts as its storage, once.
    """

    def __init__(self, known: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()
        self._seen = {storage._cdata for storage in known}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def measure_step(data: Mapping[str, Any], overrides: Iterable[str] = ()) -> dict[str, float]:
    """Build the model and optimizer of a run on this rank, train one step on random tokens and count bytes.

    Args:
        data: content of run.yaml.
        overrides: `key=value` changes.

    Returns:
        `stage`, the pipeline stage, and bytes on this rank: `weights`, `gradients` and `optimizer` state; `pass`, the
        peak of the additional memory in the forward and backward passes.
    """
    from megatron_cpt.backend import process_groups

    draft = draft_config(dict(data), list(overrides))
    assert draft.problems == [], draft.problems
    config = draft.config
    with process_groups(config.parallel) as ranks:
        return {"stage": ranks.pipeline_rank, **_measure(config, ranks.data_parallel_size)}


def measure_several(data: Mapping[str, Any], cases: Sequence[Iterable[str]]) -> list[dict[str, float]]:
    """Measure several runs in the same processes."""
    return [measure_step(data, overrides) for overrides in cases]


def _measure(config: RunConfig, data_parallel: int) -> dict[str, float]:
    from megatron_cpt.backend import seed_everything
    from megatron_cpt.model.build_model import build_model
    from megatron_cpt.optim.build_optimizer import build_optimizer

    seed_everything(config.seed, pipeline_rank=0)
    model = build_model(config)
    optimizer = build_optimizer(config.optimizer, config.schedule, config.parallel, config.precision, model.chunks)
    parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
    weights = _storages(parameters)
    gradients = _storages(parameter.main_grad for parameter in parameters)
    buffers = _storages(buffer for chunk in model.chunks for buffer in chunk.module.buffers())
    known = [*weights.values(), *gradients.values(), *buffers.values(), *_optimizer_storages(optimizer)]
    step = _make_step(config, list(model.chunks), config.batch.global_ // config.batch.micro // data_parallel)
    # gloo copies whole buffers in the gradient reduction; NCCL reduces in place.
    model.config.finalize_model_grads_func = None
    step()  # the first step creates lasting tensors (rotary tables, masks)
    gc.collect()
    live = LiveStorages(known)
    with live:
        step()
    optimizer.step()
    state = {s._cdata: s for s in _optimizer_storages(optimizer)}
    own = [s for key, s in state.items() if key not in weights and key not in gradients]
    return {
        "weights": sum(s.nbytes() for s in weights.values()),
        "gradients": sum(s.nbytes() for s in gradients.values()),
        "optimizer": sum(s.nbytes() for s in own),
        "pass": live.peak,
    }


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def _optimizer_storages(optimizer: Any) -> list[torch.UntypedStorage]:
    found: list[torch.Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        found += [p for group in inner.param_groups for p in group["params"]]
        found += [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return list(_storages(found).values())


def _make_step(config: RunConfig, chunks: list[Any], num_micro_batches: int) -> Any:
    """Forward and backward over the micro-batches of a step, on random tokens."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    micro, length = config.batch.micro, config.seq_length
    tokens = torch.randint(0, config.model.vocab, (micro, length + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(length).expand(micro, -1)
    forward_backward = get_forward_backward_func()

    def loss_func(losses: torch.Tensor) -> Any:
        return losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int), {}

    mask = torch.ones(micro, 1, length, length, dtype=torch.bool).triu(1) if config.documents.reset_attention else None

    def forward_step(_: Any, chunk: Any) -> Any:
        return chunk(inputs, positions, mask, labels=labels), loss_func

    def step() -> None:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        forward_backward(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=chunks,
            num_microbatches=num_micro_batches,
            seq_length=length,
            micro_batch_size=micro,
            forward_only=False,
        )

    return step
