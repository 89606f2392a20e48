"""Forward and backward passes of micro-batches, with summed losses by source."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_cpt.backend.cpu import unchanged_calls
from megatron_cpt.model import fp8_emulated
from megatron_cpt.model.build_model import Model
from megatron_cpt.train.device_batch import DeviceBatch, model_inputs
from megatron_cpt.train.distillation.distillation import Distillation


@dataclass(frozen=True)
class ForwardPass:
    """Forward and backward passes of one rank through the pipeline, whose losses are summed for each source.

    Attributes:
        distillation: changes the loss of training; None trains on the cross entropy.
    """

    model: Model
    num_sources: int
    context_parallel_size: int
    device: torch.device
    distillation: Distillation | None = None

    def __call__(self, micro_batches: Sequence[DeviceBatch], *, train: bool) -> torch.Tensor:
        """Run a forward pass, and a backward pass if `train`.

        Args:
            micro_batches: all of one shape; the next call may have another shape.

        Returns:
            (num_sources, 2) float64 on the device: summed cross entropy and token count by source over this rank's
            micro-batches; zeros on every pipeline stage but the last. With `train` and distillation (num_sources, 3):
            the third column is the summed divergence from the teacher.
        """
        distillation = self.distillation if train else None
        chunks = list(self.model.chunks)
        micro_batch, length = micro_batches[0].row_shape
        iterators = [iter(micro_batches) for _ in chunks]  # every virtual stage reads all micro-batches
        with contextlib.nullcontext() if distillation is None else distillation.step(micro_batches):
            reports = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, distillation),
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks,
                num_microbatches=len(micro_batches),
                seq_length=length,
                micro_batch_size=micro_batch,
                forward_only=not train,
            )
        columns = 2 if distillation is None else 3
        total = torch.zeros(self.num_sources, columns, dtype=torch.float64, device=self.device)
        for report in reports:
            total += report["loss_by_source"]
        return total

    def zero_grad(self) -> None:
        """Reset the gradient buffers of the model chunks."""
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()

    def end_step(self, *, keep_amax: bool) -> None:
        """Add the largest magnitudes (amax) of this step to the histories of emulated FP8, or drop them."""
        fp8_emulated.end_step(self.model.chunks, keep=keep_amax)

    def _forward_step(
        self, distillation: Distillation | None, micro_batches: Iterator[DeviceBatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        batch = next(micro_batches)
        inputs = model_inputs(batch, self.context_parallel_size)
        if distillation is not None:
            distillation.expect(chunk, batch.sources)
        with unchanged_calls():
            output = chunk(*inputs.positional, labels=inputs.labels, **inputs.packing)

        def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            """Return the summed loss, the token count and the report.

            megatron-core divides the gradients by the tokens of the step. This mean over tokens, unlike a mean over
            micro-batches, does not depend on how a step is divided into micro-batches and ranks.
            """
            mask = inputs.loss_mask
            masked = losses.view(mask.shape).float() * mask
            columns = [masked.detach().sum(dim=1), mask.sum(dim=1)]
            if distillation is not None:
                columns[0] = (distillation.cross_entropy.reshape(mask.shape).float() * mask).sum(dim=1)
                divergence = (distillation.divergence.reshape(mask.shape) * mask).sum(dim=1)
                columns.append(divergence * distillation.is_distilled[batch.sources])
            per_sample = torch.stack(columns, dim=1).double()
            by_source = torch.zeros(self.num_sources, len(columns), dtype=torch.float64, device=losses.device)
            by_source.index_add_(0, batch.sources, per_sample)
            return masked.sum(), mask.sum().int(), {"loss_by_source": by_source}

        return output, loss_func
