"""Update of the weights in two halves: measure the gradients, then apply them or not.

megatron-core's `optimizer.step()` does both in one call. Here all ranks decide between the halves whether to apply the
step, and the decision includes the loss. The order and the functions are those that `ChainedOptimizer.step` uses.
"""

from __future__ import annotations

import math

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared


class Update:
    """Optimizer whose step is split into `measure` and `apply`."""

    def __init__(self, optimizer: MegatronOptimizer, weight_decay: float) -> None:
        self._optimizer, self._weight_decay = optimizer, weight_decay
        self._parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
        # Copies of other ranks' parameters. The norm excludes them, so a NaN in a copy must be searched for separately.
        self._not_in_norm = [
            parameter
            for part in self._parts
            for parameter in part.get_parameters()
            if not (param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter))
        ]

    def zero_grad(self) -> None:
        """Reset the gradients."""
        self._optimizer.zero_grad()

    def measure(self) -> tuple[float, bool]:
        """Reduce the gradients; a collective call.

        Returns:
            The gradient norm over all ranks before clipping, and whether all gradients on this rank are finite.
        """
        overflowed = self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        return norm, not overflowed and math.isfinite(norm) and self._copies_are_finite()

    def apply(self, rate: float, norm: float) -> None:
        """Clip the gradients by the norm that `measure` returned, and update the weights; a collective call."""
        # On every step, so that a resumed run never inherits its checkpoint's values (Megatron-LM issues 963 and 1533).
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self._weight_decay * group.get("wd_mult", 1.0)
        for part in self._parts:
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0.0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
        self._optimizer.step_with_ready_grads()

    @torch.no_grad()
    def _copies_are_finite(self) -> bool:
        gradients = [parameter.grad for parameter in self._not_in_norm if parameter.grad is not None]
        if not gradients:
            return True
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
