"""One training step: forward and backward over the micro-batches, a decision of all ranks, one update or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_cpt.data import StepData
from megatron_cpt.train.agreement import agree
from megatron_cpt.train.resilience.anomalies import Anomaly

if TYPE_CHECKING:
    from megatron_cpt.optim.update import Update
    from megatron_cpt.train.forward import ForwardPass


@dataclass(frozen=True)
class StepResult:
    """Outcome of one step, equal on every rank.

    Attributes:
        rate: the learning rate of the step.
        loss_by_source: (num_sources, 2) float64, summed cross entropy and token count over the global batch; with a
            teacher (num_sources, 3), also the summed divergence from it.
        grad_norm: gradient norm over all ranks before clipping.
        anomaly: the spike, NaN or infinity that was found; None: the step is normal.
        requests: for each request, whether any rank made it.
    """

    rate: float
    loss_by_source: torch.Tensor
    grad_norm: float
    anomaly: Anomaly | None
    requests: list[bool]


def train_step(
    forward: ForwardPass,
    update: Update,
    data: StepData,
    rate: float,
    *,
    contributes_loss: bool,
    requests: Callable[[], Sequence[bool]],
    judge: Callable[[torch.Tensor, float, bool], Anomaly | None],
    before_update: Callable[[], None],
    sync_wait: AbstractContextManager[None] = nullcontext(),  # noqa: B008 - stateless
) -> StepResult:
    """Train on one global batch; a collective call.

    One small all-reduce between the backward pass and the update carries the losses, the gradient norm, findings and
    requests of all ranks. So every rank decides alike, and a skipped step changes neither weights, moments nor Adam's
    step count. On a GPU the host waits once, for the result of this all-reduce.

    Args:
        forward, update: the model on this rank and its optimizer.
        data: this rank's micro-batches, uploaded to the device.
        rate: the learning rate of this step.
        contributes_loss: whether this rank's losses enter the sum; see `LossMeter`.
        requests: returns what this rank asks of all ranks; called after the backward pass was issued.
        judge: finds what is wrong from the losses, the gradient norm and whether all ranks have finite numbers.
        before_update: called before weights, moments and amax histories change.
        sync_wait: entered while this thread waits for the device and the other ranks; measures that time.
    """
    forward.zero_grad()
    update.zero_grad()
    local = forward(data.uploaded.wait(), train=True)
    squared_norm, is_finite = update.measure()
    is_finite &= local.isfinite().all()
    if not contributes_loss:
        local = torch.zeros_like(local)
    asked = requests()
    with sync_wait:
        agreed = agree(local, squared_norm, is_finite, asked)
    anomaly = judge(agreed.losses, agreed.grad_norm, agreed.is_finite)
    is_applied = anomaly is None or anomaly.is_applied
    before_update()
    if is_applied:
        update.apply(rate, agreed.grad_norm)
    forward.end_step(keep_amax=is_applied)
    return StepResult(rate, agreed.losses, agreed.grad_norm, anomaly, agreed.requests)
