"""One update of the weights in two halves: measure the gradients, then apply them or leave them.

megatron-core's `optimizer.step()` measures and applies in one call. Whether a step is to be applied is for all ranks to
agree on, and the loss counts too, so the halves are called one by one here, in the order and with the functions of
`ChainedOptimizer.step` for the one optimizer that `optim.build` makes.
"""

from __future__ import annotations

import math

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_cpt.optim.build_optimizer import set_rate


class Update:
    """The optimizer of a run, one half of a step at a time."""

    def __init__(self, optimizer: MegatronOptimizer, weight_decay: float) -> None:
        self._optimizer, self._weight_decay = optimizer, weight_decay
        self._parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
        # Copies of other ranks' parameters: the norm leaves them out, so a fault in one of them would pass unseen.
        self._not_in_norm = [
            parameter
            for part in self._parts
            for parameter in part.get_parameters()
            if not (param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter))
        ]

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self._optimizer.zero_grad()

    def measure(self) -> tuple[float, bool]:
        """Make the gradients ready; a collective call.

        Returns:
            The norm of the whole gradient before clipping, and whether all that this rank can see of it is finite.
        """
        overflowed = self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        return norm, not overflowed and math.isfinite(norm) and self._copies_are_finite()

    def apply(self, rate: float, norm: float) -> None:
        """Clip by the norm and take the step; a collective call with the distributed optimizer.

        Args:
            rate: the learning rate.
            norm: what `measure` returned.
        """
        set_rate(self._optimizer, rate, self._weight_decay)
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
