"""One step: forward and backward over the micro-batches, agreement of all ranks, one update or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_cpt.data import StepData
from megatron_cpt.model import fp8_emulated
from megatron_cpt.optim.update import Update
from megatron_cpt.train.forward import ForwardPass
from megatron_cpt.train.metrics import agree
from megatron_cpt.train.resilience.anomalies import Anomaly

Judge = Callable[[torch.Tensor, float, bool], Anomaly | None]
"""From the losses of the step, the gradient norm and whether all ranks found finite numbers, to what is wrong."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind, the same on every rank.

    Attributes:
        rate: the learning rate of the step.
        loss_by_source: (num_sources, 2) float64, summed loss and tokens of the whole global batch.
        grad_norm: norm of the whole gradient before clipping.
        anomaly: what is wrong with the step, if anything is.
        requests: for each request, whether some rank made it.
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
    counts: bool,
    requests: Callable[[], Sequence[bool]],
    judge: Judge,
    before_update: Callable[[], None],
) -> StepResult:
    """Train on one global batch; a collective call.

    Losses, findings and requests of all ranks go into one small sum between the backward pass and the update. So every
    rank decides the same, and a step that is left out has not touched weights, moments or Adam's step.

    Args:
        forward: the model on this rank.
        update: its optimizer.
        data: this rank's micro-batches.
        rate: the learning rate of this step.
        counts: whether this rank's losses count (one tensor-parallel rank of the last stage does for all).
        requests: what this rank asks of all ranks; called after the backward pass.
        judge: says what is wrong.
        before_update: called before weights, moments and amax histories change.
    """
    for chunk in forward.model.chunks:
        chunk.zero_grad_buffer()
    update.zero_grad()
    own = forward(data.micro_batches, train=True)
    grad_norm, is_finite = update.measure()
    is_finite = is_finite and bool(own.isfinite().all())
    (has_bad_rank, *asked), losses = agree([not is_finite, *requests()], own if counts else torch.zeros_like(own))
    anomaly = judge(losses, grad_norm, not has_bad_rank)
    is_applied = anomaly is None or anomaly.is_applied
    before_update()
    if is_applied:
        update.apply(rate, grad_norm)
    fp8_emulated.end_step(forward.model.chunks, keep=is_applied)
    return StepResult(rate, losses, grad_norm, anomaly, asked)
