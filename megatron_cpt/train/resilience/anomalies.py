"""Detection of bad steps: a loss or gradient that is NaN or infinite, or a loss far above the previous ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from megatron_cpt.config.resilience import ResilienceConfig, SpikeConfig
from megatron_cpt.train.metrics import named_losses
from megatron_cpt.train.state import TrainState

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session
    from megatron_cpt.train.step import StepResult

_MAX_NAMES = 5  # parameters listed per rank; once one gradient is not finite, soon all are


@dataclass(frozen=True)
class Anomaly:
    """Bad step.

    Attributes:
        kind: `loss` or `gradient`: it is not finite; `spike`: the loss is far above the previous losses.
        value: the loss or the gradient norm.
        limit: for a spike, the highest normal loss.
        action: `warn`: the update is applied; `skip`: the update is skipped; `stop`: it is skipped and the run ends.
    """

    kind: Literal["loss", "gradient", "spike"]
    value: float
    limit: float | None
    action: Literal["warn", "skip", "stop"]

    @property
    def is_applied(self) -> bool:
        """True if the update is applied despite the anomaly."""
        return self.action == "warn"


def spike_limit(losses: Sequence[float], spike: SpikeConfig) -> float | None:
    """Return the highest loss that is no spike: mean + sigma x standard deviation of the previous losses.

    Example: losses 1, 3, 3, 5 with sigma 3 have mean 3 and variance 8 / 3, so the limit is 3 + 3 x 1.63 = 7.9.

    `fsum` rounds once at the end, so ranks on different processors get numbers that are identical bit for bit.

    Returns:
        None if the rule is off or has too few losses.
    """
    if spike.action == "off" or len(losses) < spike.num_needed:
        return None
    losses = losses[-spike.window :]
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
    return mean + spike.sigma * math.sqrt(variance)


def find_anomaly(
    loss: float, grad_norm: float, is_finite: bool, losses: Sequence[float], spike: SpikeConfig
) -> Anomaly | None:
    """Return the anomaly of a step; None: the step is normal.

    Args:
        loss: mean loss per token over the global batch, with its part from a teacher.
        grad_norm: gradient norm over all ranks.
        is_finite: whether all ranks found finite losses and gradients.
        losses: of the previous steps.
    """
    if not math.isfinite(loss):
        return Anomaly("loss", loss, None, "skip")
    if not is_finite:
        return Anomaly("gradient", grad_norm, None, "skip")
    limit = spike_limit(losses, spike)
    if limit is not None and loss > limit and spike.action != "off":
        return Anomaly("spike", loss, limit, spike.action)
    return None


def note_loss(state: TrainState, loss: float, anomaly: Anomaly | None, spike: SpikeConfig) -> None:
    """Update the counters of skipped updates and the window of losses after a step.

    A spike enters the window too, so a loss that stays on a new level is reported once and not forever.
    """
    is_skipped = anomaly is not None and not anomaly.is_applied
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if is_skipped else 0
    state.skipped += is_skipped
    if math.isfinite(loss) and spike.action != "off":
        state.recent_losses = [*state.recent_losses[-spike.window + 1 :], loss]


def describe(anomaly: Anomaly, result: StepResult, session: Session) -> dict[str, Any]:
    """Return the line of anomalies.jsonl for the step just done, without its samples; a collective call."""
    losses = named_losses(result.loss_by_source, session.meter.names, session.config.teacher)
    return {
        "step": session.state.step,
        "kind": anomaly.kind,
        "value": anomaly.value,
        "limit": anomaly.limit,
        "action": anomaly.action,
        "skipped_in_a_row": session.state.skipped_in_a_row,
        **losses,
        "grad_norm": result.grad_norm,
        "not_finite_on_ranks": {} if anomaly.kind == "spike" else _not_finite_by_rank(session.model.chunks),
    }


def _not_finite_by_rank(chunks: Sequence[torch.nn.Module]) -> dict[str, list[str]]:
    """Return by rank the first parameters whose gradient is not finite; empty on ranks other than 0."""
    named: list[Any] = [item for chunk in chunks for item in chunk.named_parameters()]
    own = [name for name, parameter in named if not parameter.main_grad.isfinite().all()][:_MAX_NAMES]
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, parts, dst=0)
    return {str(rank): names for rank, names in enumerate(parts or []) if names}


def reason_to_stop(anomaly: Anomaly, state: TrainState, config: ResilienceConfig) -> str | None:
    """Return why the run must end after this step, equal on every rank; None: it continues."""
    advice = (
        "the last checkpoint is unchanged; anomalies.jsonl names the samples; "
        "lower schedule.max_lr or inspect the data of these steps"
    )
    if anomaly.action == "stop":
        return f"step {state.step}: the loss is {anomaly.value:.4f}, above {anomaly.limit:.4f}; {advice}"
    if state.skipped_in_a_row >= config.stop_after:
        skipped = f"{state.skipped_in_a_row} update{'s' if state.skipped_in_a_row > 1 else ''} in a row skipped"
        kind = "a spike" if anomaly.kind == "spike" else f"a {anomaly.kind} that is not finite"
        return f"step {state.step}: {skipped}, this one for {kind} ({anomaly.value}); {advice}"
    return None
