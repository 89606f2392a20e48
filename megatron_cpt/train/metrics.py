"""Losses, summed where they arise and brought together only when somebody wants to see them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


def agree(flags: Sequence[bool], local: torch.Tensor) -> tuple[list[bool], torch.Tensor]:
    """What any rank says, and the sum of all losses, in one small exchange; a collective call.

    Args:
        flags: what this rank says.
        local: (num_sources, 2) float64, this rank's sums of loss and tokens.

    Returns:
        For each flag whether some rank has raised it, and the sums of all ranks.
    """
    together = torch.cat([torch.tensor([float(flag) for flag in flags], dtype=torch.float64), local.flatten()])
    if dist.get_world_size() > 1:
        dist.all_reduce(together)
    return [flag > 0 for flag in together[: len(flags)].tolist()], together[len(flags) :].view_as(local)


def reduce_losses(local: torch.Tensor) -> torch.Tensor:
    """Add up (num_sources, 2) sums of loss and tokens over all ranks; a collective call."""
    total = local.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def mean_losses(total: torch.Tensor, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Mean loss a token over everything, and by source (sources without a token are left out)."""
    loss_sum, tokens = total.sum(dim=0).tolist()
    by_source = {name: s / n for name, (s, n) in zip(names, total.tolist(), strict=True) if n}
    return loss_sum / tokens if tokens else float("nan"), by_source


@dataclass
class LossMeter:
    """Sums since the last line of metrics.

    Attributes:
        names: the sources, in the order of the vectors.
        counts: whether this rank's sums count (one tensor-parallel rank of the last stage does for all).
    """

    names: Sequence[str]
    counts: bool

    def __post_init__(self) -> None:
        self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64)
        self._tokens = 0
        self._started = time.perf_counter()

    def add(self, loss_by_source: torch.Tensor, tokens: int) -> None:
        """Note one step: the sums of all ranks, and its tokens; losses that are no numbers are left out."""
        self._tokens += tokens
        if loss_by_source.isfinite().all():
            self._sums += loss_by_source

    def take(self) -> dict[str, Any]:
        """Means over the steps since the last call, and start anew."""
        loss, by_source = mean_losses(self._sums, self.names)
        now = time.perf_counter()
        rate = self._tokens / max(now - self._started, 1e-9)
        self._sums.zero_()
        self._tokens, self._started = 0, now
        return {"loss": loss, "tokens_per_second": rate, "loss_by_source": by_source}

    def skip_time(self, seconds: float) -> None:
        """Leave seconds of something else (a checkpoint, a validation) out of the tokens a second."""
        self._started += seconds
