"""Update of the weights in two halves: measure the gradients, then apply them or not.

megatron-core's `optimizer.step()` does both in one call. Here all ranks decide between the halves whether to apply the
step, and the decision includes the loss. The order and the functions are those that `ChainedOptimizer.step` uses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared


class Update:
    """Optimizer whose step is split into `measure` and `apply`."""

    def __init__(self, optimizer: MegatronOptimizer, weight_decay: float) -> None:
        self._optimizer, self._weight_decay = optimizer, weight_decay
        self._parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
        # megatron-core adds the squares over this group: all ranks with the distributed optimizer, otherwise the ranks
        # of one replica of the model. Of equal replicas, the one with rank 0 enters the sum over all ranks.
        group = optimizer.get_grad_stats_parallel_group()
        self._contributes_norm = 0 in dist.get_process_group_ranks(group)
        # As megatron-core selects them, whose method has another name in 0.16 and 0.19. The others are copies of other
        # ranks' parameters: the norm excludes them, so a NaN in a copy must be searched for separately.
        self._in_norm: list[torch.Tensor] = []
        self._not_in_norm: list[torch.Tensor] = []
        for parameter in (p for part in self._parts for p in part.get_parameters()):
            is_own = param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
            (self._in_norm if is_own else self._not_in_norm).append(parameter)

    def zero_grad(self) -> None:
        """Reset the gradients."""
        self._optimizer.zero_grad()

    def measure(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepare the gradients, without waiting for the device.

        The squared norms of all ranks add up to the square of megatron-core's `get_grad_norm`.

        Returns:
            This rank's part of the squared gradient norm over all ranks before clipping, fp32 (), and whether all
            gradients on this rank are finite, bool ().
        """
        self._optimizer.prepare_grads()  # its result concerns fp16, which scales the loss
        squared_norm = _gradient_norm(self._in_norm) ** 2
        is_finite = squared_norm.isfinite() & _gradient_norm(self._not_in_norm).isfinite()
        return squared_norm if self._contributes_norm else torch.zeros_like(squared_norm), is_finite

    def apply(self, rate: float, norm: float) -> None:
        """Clip the gradients by their norm over all ranks, and update the weights; a collective call."""
        # On every step, so that a resumed run never inherits its checkpoint's values (Megatron-LM issues 963 and 1533).
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self._weight_decay * group.get("wd_mult", 1.0)
        for part in self._parts:
            if part.config.clip_grad > 0.0:
                _clip(part.get_parameters(), part.config.clip_grad, norm)
        self._optimizer.step_with_ready_grads()


def _gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return the gradient that the optimizer reads; precision-aware optimizers keep it under another name."""
    gradient: torch.Tensor | None = getattr(parameter, "decoupled_grad", None)
    return gradient if gradient is not None else parameter.grad


@torch.no_grad()
def _clip(parameters: list[torch.Tensor], max_norm: float, norm: float) -> None:
    """Scale the gradients in place as megatron-core's `clip_grad_by_total_norm_fp32`, in a few kernels for all of them.

    That function takes two kernels per parameter where Transformer Engine lacks one of the names that it imports:
    megatron-core 0.19 asks for `multi_tensor_scale_tensor`, which Transformer Engine 2.12 does not have.
    """
    scale = max_norm / (norm + 1e-6)
    gradients = [gradient for gradient in map(_gradient, parameters) if gradient is not None]
    if scale < 1.0 and gradients:
        torch._foreach_mul_(gradients, scale)


@torch.no_grad()
def _gradient_norm(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Return the norm of the gradients as one vector, fp32 (), in a few kernels for all of them."""
    gradients = [gradient for gradient in map(_gradient, parameters) if gradient is not None]
    if not gradients:
        return torch.zeros((), device=torch.cuda.current_device())
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())
    return norm
