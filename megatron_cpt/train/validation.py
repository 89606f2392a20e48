"""Held-out loss by source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch

from megatron_cpt.data import Batch
from megatron_cpt.train.forward import ForwardPass
from megatron_cpt.train.metrics import mean_losses, reduce_losses


@dataclass(frozen=True)
class Validator:
    """Measures the loss of the same samples of each held-out source every time.

    Attributes:
        batches: by source, a function that reads this rank's micro-batches; every rank gets as many.
        group: micro-batches that go through the pipeline at once: as many as in a training step, so that memory and
            the interleaved schedule's rules are those of training.
        counts: whether this rank's sums count.
    """

    batches: Mapping[str, Callable[[], Iterable[Batch]]]
    group: int
    counts: bool

    def run(self, forward: ForwardPass, note: Callable[[str], None] = lambda source: None) -> dict[str, float]:
        """Mean loss a token of each held-out source; a collective call.

        Args:
            forward: the model.
            note: called with the source before each group of micro-batches.
        """
        chunks = forward.model.chunks
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            sums = [self._sums(read(), forward, partial(note, name)) for name, read in self.batches.items()]
        for chunk in chunks:
            chunk.train()
        total = torch.stack(sums)
        total = reduce_losses(total if self.counts else torch.zeros_like(total))
        return mean_losses(total, list(self.batches))[1]

    def _sums(self, batches: Iterable[Batch], forward: ForwardPass, note: Callable[[], None]) -> torch.Tensor:
        """Summed loss and tokens of one source, (2,) float64."""
        total = torch.zeros(2, dtype=torch.float64)
        for group in batched(batches, self.group):
            note()
            filler = replace(group[-1], loss_mask=np.zeros_like(group[-1].loss_mask))
            total += forward([*group, *[filler] * (self.group - len(group))], train=False).sum(dim=0)
        return total


def batched(items: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` items; the last may be shorter (itertools.batched, which Python 3.11 does not have)."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
