"""Steps whose numbers are wrong: not a number, infinite, or far above those before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_cpt.config.resilience import ResilienceConfig, SpikeConfig
from megatron_cpt.model.build_model import Model
from megatron_cpt.train.metrics import mean_losses
from megatron_cpt.train.state import TrainState

_MOST_NAMES = 5  # parameters that a rank names; where one is not finite, soon all are


@dataclass(frozen=True)
class Anomaly:
    """What is wrong with a step.

    Attributes:
        kind: `loss` or `gradient`: not finite; `spike`: a loss far above those before.
        value: the loss or the gradient norm.
        limit: spike: the highest loss that would have passed.
        action: `warn`: the update was applied; `skip`: it was left out; `stop`: left out, and the run ends.
    """

    kind: Literal["loss", "gradient", "spike"]
    value: float
    limit: float | None
    action: Literal["warn", "skip", "stop"]

    @property
    def is_applied(self) -> bool:
        """Whether the update is taken all the same."""
        return self.action == "warn"


def spike_limit(losses: Sequence[float], spike: SpikeConfig) -> float | None:
    """The highest loss that is no spike: mean + sigma x standard deviation of the losses before.

    fsum is exact before it rounds once, so ranks on different processors find the same number to the bit.

    Args:
        losses: finite losses, the newest last; at most the last `window` count.
        spike: the rule.

    Returns:
        None where the rule is off or has too few losses.
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
    """What is wrong with a step, if anything is.

    Args:
        loss: mean loss a token of the global batch.
        grad_norm: of the whole gradient.
        is_finite: whether all ranks found finite losses and gradients.
        losses: those of the steps before.
        spike: the rule for spikes.
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
    """Bring the counters of bad steps and the window up to date with a step.

    A spike enters the window as well: a loss that has moved to another level for good is found once, not for ever.
    """
    is_skipped = anomaly is not None and not anomaly.is_applied
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if is_skipped else 0
    state.skipped += is_skipped
    if math.isfinite(loss) and spike.action != "off":
        state.recent_losses = [*state.recent_losses[-spike.window + 1 :], loss]


def describe(
    anomaly: Anomaly, state: TrainState, losses: torch.Tensor, names: Sequence[str], grad_norm: float, model: Model
) -> dict[str, Any]:
    """The line of anomalies.jsonl without the samples; a collective call.

    Args:
        anomaly: what is wrong.
        state: after the step.
        losses: (num_sources, 2) summed loss and tokens of the step.
        names: the sources.
        grad_norm: of the step.
        model: its gradients are those of the step.
    """
    mean, by_source = mean_losses(losses, names)
    return {
        "step": state.step,
        "kind": anomaly.kind,
        "value": anomaly.value,
        "limit": anomaly.limit,
        "action": anomaly.action,
        "skipped_in_a_row": state.skipped_in_a_row,
        "loss": mean,
        "grad_norm": grad_norm,
        "loss_by_source": by_source,
        "not_finite_on_ranks": {} if anomaly.kind == "spike" else _not_finite_by_rank(model),
    }


def _not_finite_by_rank(model: Model) -> dict[str, list[str]]:
    """Parameters with a gradient that is not finite, the first few by rank; on rank 0, elsewhere empty."""
    named = [item for chunk in model.chunks for item in chunk.named_parameters()]
    own = [name for name, parameter in named if not parameter.main_grad.isfinite().all()][:_MOST_NAMES]
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, parts, dst=0)
    return {str(rank): names for rank, names in enumerate(parts or []) if names}


def reason_to_stop(anomaly: Anomaly, state: TrainState, config: ResilienceConfig) -> str | None:
    """Why the run must end here, the same words on every rank; None: it goes on."""
    where = (
        "the last checkpoint is untouched; anomalies.jsonl names the samples; "
        "lower schedule.max_lr or look at the data of these steps"
    )
    if anomaly.action == "stop":
        return f"step {state.step}: the loss is {anomaly.value:.4f}, above {anomaly.limit:.4f}; {where}"
    if state.skipped_in_a_row >= config.stop_after:
        what = f"{state.skipped_in_a_row} update{'s' if state.skipped_in_a_row > 1 else ''} in a row left out"
        kind = "a spike" if anomaly.kind == "spike" else f"a {anomaly.kind} that is not finite"
        return f"step {state.step}: {what}, this one for {kind} ({anomaly.value}); {where}"
    return None
