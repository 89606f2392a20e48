"""Held-out loss by source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch

from megatron_cpt.data import Batch
from megatron_cpt.train.agreement import reduce_losses
from megatron_cpt.train.device_batch import Upload
from megatron_cpt.train.forward import ForwardPass
from megatron_cpt.train.metrics import mean_losses


@dataclass(frozen=True)
class Validator:
    """Measurement of the loss on the same samples of each held-out source every time.

    Attributes:
        batches: by source, a function that reads this rank's micro-batches; every rank reads the same number.
        group: micro-batches that go through the pipeline together. It equals the number in a training step, so memory
            and the rules of the interleaved schedule are the same as in training.
        upload: moves a group to the device.
        contributes_loss: whether this rank's losses enter the sum; see `LossMeter`.
    """

    batches: Mapping[str, Callable[[], Iterable[Batch]]]
    group: int
    upload: Upload
    contributes_loss: bool

    def run(self, forward: ForwardPass, note: Callable[[str], None] = lambda source: None) -> dict[str, float]:
        """Return the mean loss per token of each held-out source; a collective call.

        Args:
            forward: the model.
            note: called with the source before each group of micro-batches.
        """
        chunks = forward.model.chunks
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            sums = [self._sum_losses(read(), forward, partial(note, name)) for name, read in self.batches.items()]
        for chunk in chunks:
            chunk.train()
        local = torch.stack(sums)
        total = reduce_losses(local if self.contributes_loss else torch.zeros_like(local))
        return mean_losses(total, list(self.batches))[1]

    def _sum_losses(self, batches: Iterable[Batch], forward: ForwardPass, note: Callable[[], None]) -> torch.Tensor:
        """Return the summed loss and the tokens of one source, (2,) float64 on the device.

        The last group is filled up with copies of its last micro-batch whose loss does not count.
        """
        total = torch.zeros(2, dtype=torch.float64, device=forward.device)
        iterator = iter(batches)
        while group := list(islice(iterator, self.group)):
            note()
            filler = replace(group[-1], loss_mask=np.zeros_like(group[-1].loss_mask))
            uploaded = self.upload([*group, *[filler] * (self.group - len(group))])
            total += forward(uploaded.wait(), train=False).sum(dim=0)
        return total
