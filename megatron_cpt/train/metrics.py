"""Losses by source and throughput: summed on each step, reported every few steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


def reduce_flags_and_losses(flags: Sequence[bool], local: torch.Tensor) -> tuple[list[bool], torch.Tensor]:
    """Combine the flags and losses of all ranks in one small all-reduce; a collective call.

    Args:
        flags: of this rank.
        local: (num_sources, 2) float64, summed loss and token count by source on this rank.

    Returns:
        For each flag whether any rank raised it, and `local` summed over all ranks.
    """
    packed = torch.cat([torch.tensor([float(flag) for flag in flags], dtype=torch.float64), local.flatten()])
    packed = reduce_losses(packed)
    return [flag > 0 for flag in packed[: len(flags)].tolist()], packed[len(flags) :].view_as(local)


def reduce_losses(local: torch.Tensor) -> torch.Tensor:
    """Return `local` summed over all ranks; a collective call."""
    total = local.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def mean_losses(total: torch.Tensor, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Return the mean loss per token over all sources, and by source for each source that has tokens.

    Example: [[6.0, 3.0], [2.0, 1.0], [0.0, 0.0]] for web, code and qa gives 8 / 4 = 2.0 and {web: 2.0, code: 2.0}.
    """
    loss_sum, tokens = total.sum(dim=0).tolist()
    by_source = {name: s / n for name, (s, n) in zip(names, total.tolist(), strict=True) if n}
    return loss_sum / tokens if tokens else float("nan"), by_source


@dataclass
class LossMeter:
    """Sums of losses, tokens and FLOPs since the last line of metrics.

    Attributes:
        names: the sources, in the order of the vectors.
        contributes_loss: whether this rank's losses enter the sum over ranks. Only the last pipeline stage has losses,
            and its tensor-parallel ranks have equal ones, so one of them contributes.
    """

    names: Sequence[str]
    contributes_loss: bool

    def __post_init__(self) -> None:
        self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64)
        self._tokens, self._flops = 0, 0.0
        self._started = time.perf_counter()

    def add(self, loss_by_source: torch.Tensor, tokens: int, flops_per_token: float) -> None:
        """Add one step; losses that are not finite are skipped.

        Args:
            loss_by_source: (num_sources, 2) float64, summed loss and token count over all ranks.
            tokens: trained on in this step by all ranks.
            flops_per_token: model FLOPs of training on one token.
        """
        self._tokens += tokens
        self._flops += tokens * flops_per_token
        if loss_by_source.isfinite().all():
            self._sums += loss_by_source

    def take(self) -> dict[str, Any]:
        """Return means and rates over the steps since the last call, and reset the sums."""
        loss, by_source = mean_losses(self._sums, self.names)
        now = time.perf_counter()
        seconds = max(now - self._started, 1e-9)
        rates = {"tokens_per_second": self._tokens / seconds, "flops_per_second": self._flops / seconds}
        self._sums.zero_()
        self._tokens, self._flops, self._started = 0, 0.0, now
        return {"loss": loss, "loss_by_source": by_source, **rates}

    def skip_time(self, seconds: float) -> None:
        """Exclude seconds that were spent on a checkpoint or a validation from the rates."""
        self._started += seconds
