"""Sums over all ranks that every rank receives: one all-reduce on the device, then one download."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Agreement:
    """Numbers of one step, equal on every rank.

    Attributes:
        is_finite: True if the losses and gradients of all ranks are finite.
        requests: for each request, whether any rank made it.
        losses: (num_sources, 2 or 3) float64 on the CPU, sums over the global batch as in `StepResult`.
        grad_norm: over all ranks, before clipping.
    """

    is_finite: bool
    requests: list[bool]
    losses: torch.Tensor
    grad_norm: float


def agree(
    losses: torch.Tensor, squared_norm: torch.Tensor, is_finite: torch.Tensor, requests: Sequence[bool]
) -> Agreement:
    """Combine the numbers of all ranks; a collective call, and the only place of a step where the host waits.

    Args:
        losses: (num_sources, 2 or 3) float64, this rank's part of the sum.
        squared_norm: (), this rank's part of the squared gradient norm.
        is_finite: bool (), whether this rank's losses and gradients are finite.
        requests: of this rank.
    """
    # Scalars reach the device as arguments of a kernel; a tensor made of Python numbers would be a copy that waits.
    asked = [torch.full((1,), float(request), dtype=torch.float64, device=losses.device) for request in requests]
    parts = [is_finite.logical_not().double().view(1), *asked, losses.flatten(), squared_norm.double().view(1)]
    total = reduce_losses(torch.cat(parts))
    bad_ranks, *requesting_ranks = total[: 1 + len(requests)].tolist()
    # megatron-core adds squares in fp32. A sum of two fp32 numbers in fp64 is rounded to the same fp32 number.
    grad_norm = total[-1].float().item() ** 0.5
    summed = total[1 + len(requests) : -1].view_as(losses)
    is_finite_everywhere = bad_ranks == 0 and math.isfinite(grad_norm)
    return Agreement(is_finite_everywhere, [ranks > 0 for ranks in requesting_ranks], summed, grad_norm)


def reduce_losses(local: torch.Tensor) -> torch.Tensor:
    """Return the sum of `local` over all ranks, on the CPU; a collective call."""
    total = local.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.cpu()
