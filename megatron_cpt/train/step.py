"""One step: forward and backward over the micro-batches, one update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.data import StepData
from megatron_cpt.optim.build import set_rate
from megatron_cpt.train.forward import ForwardPass


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind.

    Attributes:
        loss_by_source: (num_sources, 2) float64, this rank's summed loss and tokens.
        grad_norm: norm of the whole gradient before clipping.
    """

    loss_by_source: torch.Tensor
    grad_norm: float


def train_step(
    forward: ForwardPass, optimizer: MegatronOptimizer, data: StepData, rate: float, weight_decay: float
) -> StepResult:
    """Train on one global batch; a collective call.

    Args:
        forward: the model on this rank.
        optimizer: its optimizer.
        data: this rank's micro-batches.
        rate: the learning rate of this step.
        weight_decay: decoupled weight decay.
    """
    for chunk in forward.model.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = forward(data.micro_batches, train=True)
    set_rate(optimizer, rate, weight_decay)
    _, grad_norm, _ = optimizer.step()
    return StepResult(losses, float(grad_norm))
