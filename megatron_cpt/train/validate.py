"""Held-out loss by source: always the same samples, at most one epoch of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_cpt.data import Batch, TokenStream
from megatron_cpt.data.batch import DocumentOptions, batch_of
from megatron_cpt.train.forward import ForwardPass
from megatron_cpt.train.metrics import mean_losses, reduce_losses


@dataclass(frozen=True)
class Validator:
    """Measures the loss of the first samples of each held-out stream.

    Attributes:
        streams: one a held-out source.
        num_samples: at most so many samples of each.
        micro_batch: sequences a forward pass.
        data_parallel_rank, data_parallel_size: this rank's share.
        documents: masks at document ends, as in training.
        counts: whether this rank's sums count.
    """

    streams: Sequence[TokenStream]
    num_samples: int
    micro_batch: int
    data_parallel_rank: int
    data_parallel_size: int
    documents: DocumentOptions
    counts: bool

    def run(self, forward: ForwardPass) -> dict[str, float]:
        """Mean loss a token of each held-out source; a collective call."""
        chunks = forward.model.chunks
        for chunk in chunks:
            chunk.eval()
        sums = torch.stack([self._sums(stream, forward) for stream in self.streams])
        for chunk in chunks:
            chunk.train()
        total = reduce_losses(sums if self.counts else torch.zeros_like(sums))
        return mean_losses(total, [stream.name for stream in self.streams])[1]

    def _sums(self, stream: TokenStream, forward: ForwardPass) -> torch.Tensor:
        with torch.no_grad():
            return forward(self._micro_batches(stream), train=False).sum(dim=0)

    def _micro_batches(self, stream: TokenStream) -> list[Batch]:
        """This rank's share; every rank gets as many, filled up with samples that do not count."""
        count = min(self.num_samples, stream.samples_per_epoch)
        block = self.micro_batch * self.data_parallel_size
        batches = []
        for start in range(0, count, block):
            first = start + self.data_parallel_rank * self.micro_batch
            numbers = np.arange(first, first + self.micro_batch)
            samples = np.stack([stream.read(k) for k in np.minimum(numbers, count - 1).tolist()])
            batch = batch_of(samples, np.zeros(self.micro_batch, np.int64), self.documents)
            batch.loss_mask[numbers >= count] = 0.0
            batches.append(batch)
        return batches
