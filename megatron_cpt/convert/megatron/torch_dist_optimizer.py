"""Adam's state in a torch_dist checkpoint: moments and master weights in the shapes of the weights, and its step.

megatron-core's distributed optimizer has several formats. Only `fully_reshardable` stores tensors that belong to one
weight each, as its plain optimizers do: `optimizer.state.exp_avg.decoder.final_layernorm.weight`. The other formats
store ranges of the run's own buffers, which no other layout can use.

Format: `sharded_param_state_fully_reshardable` in megatron/core/optimizer/distrib_optimizer.py, versions 0.16 and 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_cpt.checkpoint.torchfile.stored_tensor import StoredTensor
from megatron_cpt.convert.mapping.names import EMBEDDING, OUTPUT_LAYER, optimizer_prefix
from megatron_cpt.convert.mapping.resolve import refuse_wrong_tensors
from megatron_cpt.convert.mapping.tensors import Mosaic, MosaicWeights
from megatron_cpt.convert.megatron.torch_dist_reader import TorchDistWeights
from megatron_cpt.errors import RefusedError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER_WEIGHT = "param"
_OTHER_MASTER_WEIGHT = "fp32_param"  # of megatron-core's plain optimizer in bf16
_BUFFERS = "optimizer.distributed."
_GROUP_DEFAULTS = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}


@dataclass(frozen=True)
class AdamState:
    """Optimizer state of a checkpoint.

    Attributes:
        tensors: moments and master weights, each named like `optimizer.state.exp_avg.` and the weight's name.
        groups: parameter groups, as plain values.
    """

    tensors: MosaicWeights
    groups: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """Number of updates so far."""
        return int(self.groups[0]["step"])


def read_adam_state(
    weights: TorchDistWeights, common: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> AdamState:
    """Describe the optimizer state of a checkpoint.

    Args:
        common: entries besides the tensors.
        expected: shapes of the model's weights.

    Raises:
        RefusedError: the checkpoint has no optimizer state, or one that only its own layout can load.
    """
    where = f"--optimizer: {weights.folder}"
    keys = weights.keys()
    prefixes = {kind: optimizer_prefix(kind) for kind in (*_MOMENTS, _MASTER_WEIGHT, _OTHER_MASTER_WEIGHT)}
    found = {kind: prefix for kind, prefix in prefixes.items() if any(key.startswith(prefix) for key in keys)}
    if not all(kind in found for kind in _MOMENTS):
        if buffers := [key for key in keys if _BUFFERS in key]:
            raise RefusedError(
                f"{where}: {buffers[0]}: the optimizer is stored as ranges of the run's buffers, which only its own "
                "layout can load; save the checkpoint with --dist-ckpt-optim-fully-reshardable, or import without "
                "--optimizer"
            )
        raise RefusedError(f"{where}: holds no moments of Adam (optimizer.state.exp_avg.*); import without --optimizer")
    tensors: dict[str, Mosaic] = {}
    for kind in _MOMENTS:
        tensors |= weights.collect(prefixes[kind])
    tensors |= _master_weights(weights, [kind for kind in (_MASTER_WEIGHT, _OTHER_MASTER_WEIGHT) if kind in found])
    shapes = {
        optimizer_prefix(kind) + name: shape for kind in (*_MOMENTS, _MASTER_WEIGHT) for name, shape in expected.items()
    }
    refuse_wrong_tensors(where, tensors, shapes, padded=[name for name in shapes if is_padded(name)])
    return AdamState(MosaicWeights(tensors), _groups(common, where))


def is_padded(name: str) -> bool:
    """Return whether a tensor has one row per id of the padded vocabulary."""
    return name.endswith((EMBEDDING, OUTPUT_LAYER))


def _master_weights(weights: TorchDistWeights, kinds: list[str]) -> dict[str, Mosaic]:
    target = optimizer_prefix(_MASTER_WEIGHT)
    if kinds:
        prefix = optimizer_prefix(kinds[0])
        return {target + name.removeprefix(prefix): mosaic for name, mosaic in weights.collect(prefix).items()}
    rounded = [name for name, mosaic in weights.tensors.items() if mosaic.dtype is not torch.float32]
    if rounded:
        raise RefusedError(
            f"--optimizer: {weights.folder}: {rounded[0]} is stored as {weights.tensors[rounded[0]].dtype} and there "
            "are no fp32 master weights; import without --optimizer"
        )
    return {target + name: mosaic for name, mosaic in weights.tensors.items()}  # plain optimizer in fp32


def _groups(common: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    state = common.get("optimizer")
    inner = state.get("optimizer", state) if isinstance(state, Mapping) else {}
    groups = inner.get("param_groups") if isinstance(inner, Mapping) else None
    if not isinstance(groups, list) or not groups or not all(isinstance(group, Mapping) for group in groups):
        raise RefusedError(f"{where}: has no parameter groups; import without --optimizer")
    per_parameter = inner.get("state")  # torch's AdamW counts steps per parameter
    common_step = per_parameter.get("common_step") if isinstance(per_parameter, Mapping) else None
    steps = {_number(group.get("step", common_step)) for group in groups}
    if len(steps) != 1 or None in steps:
        raise RefusedError(f"{where}: its parameter groups do not say Adam's step; import without --optimizer")
    return [_group(group, int(steps.copy().pop() or 0)) for group in groups]


def _group(stored: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return the plain values of a group; NeMo 2 writes `pre_wd_mult` for `wd_mult`."""
    plain = {name: value for name, value in stored.items() if _is_plain(value) and name != "params"}
    marks = {name: plain.pop(f"pre_{name}", default) for name, default in _GROUP_DEFAULTS.items()}
    return {"bias_correction": True, **marks, **plain, "step": step}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(part, int | float) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _number(value: Any) -> float | None:
    if isinstance(value, StoredTensor) and value.shape in ((), (1,)):
        value = value.read().item()
    return float(value) if isinstance(value, int | float) else None
