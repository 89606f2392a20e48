"""Forward and backward passes of micro-batches, with summed losses by source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_cpt.model import fp8_emulated
from megatron_cpt.model.build_model import Model
from megatron_cpt.train.device_batch import DeviceBatch


@dataclass(frozen=True)
class ForwardPass:
    """Forward and backward passes of one rank through the pipeline, whose losses are summed for each source."""

    model: Model
    num_sources: int
    context_parallel_size: int
    device: torch.device

    def __call__(self, micro_batches: Sequence[DeviceBatch], *, train: bool) -> torch.Tensor:
        """Run a forward pass, and a backward pass if `train`.

        Args:
            micro_batches: all of one shape; the next call may have another shape.

        Returns:
            (num_sources, 2) float64 on the device: summed loss and token count by source over this rank's
            micro-batches; zeros on every pipeline stage but the last.
        """
        chunks = list(self.model.chunks)
        micro_batch, length = micro_batches[0].tokens.shape
        if micro_batches[0].sequence_bounds is not None:
            micro_batch, length = 1, micro_batch * length
        iterators = [iter(micro_batches) for _ in chunks]  # every virtual stage reads all micro-batches
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=micro_batch,
            forward_only=not train,
        )
        total = torch.zeros(self.num_sources, 2, dtype=torch.float64, device=self.device)
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
        self, micro_batches: Iterator[DeviceBatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        batch = next(micro_batches)
        tensors = self._tensors(batch)
        inputs, packing = [tensors[name] for name in ("tokens", "position_ids", "labels")], {}
        if batch.sequence_bounds is not None:
            inputs = [tensor.view(1, -1) for tensor in inputs]
            packing = {"packed_seq_params": _packed_sequences(batch.sequence_bounds, batch.longest_sequence)}
        tokens, position_ids, labels = inputs
        output = chunk(tokens, position_ids, tensors.get("attention_mask"), labels=labels, **packing)

        def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            """Return the summed loss, the token count and the report.

            megatron-core divides the gradients by the tokens of the step. This mean over tokens, unlike a mean over
            micro-batches, does not depend on how a step is divided into micro-batches and ranks.
            """
            mask = tensors["loss_mask"]
            masked = losses.view(mask.shape).float() * mask
            by_source = torch.zeros(self.num_sources, 2, dtype=torch.float64, device=losses.device)
            per_sample = torch.stack([masked.detach().sum(dim=1), mask.sum(dim=1)], dim=1).double()
            by_source.index_add_(0, batch.sources, per_sample)
            return masked.sum(), mask.sum().int(), {"loss_by_source": by_source}

        return output, loss_func

    def _tensors(self, batch: DeviceBatch) -> dict[str, torch.Tensor]:
        names = ("tokens", "labels", "loss_mask", "position_ids")
        tensors = {name: getattr(batch, name) for name in names}
        if batch.attention_documents is not None:
            tensors["attention_mask"] = document_mask(batch.attention_documents)
        if self.context_parallel_size > 1:
            from megatron.core.utils import get_batch_on_this_cp_rank

            tensors = get_batch_on_this_cp_rank(tensors)
        return tensors


def _packed_sequences(bounds: torch.Tensor, longest: int) -> PackedSeqParams:
    """Return packed documents in megatron-core's `thd` format."""
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """Return the attention mask that hides later tokens and other documents.

    Args:
        documents: (b, s) number of each token's document.

    Returns:
        bool (b, 1, s, s), True where attention is forbidden, as megatron-core defines it.
    """
    length = documents.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=documents.device).triu(1)
    other = documents[:, :, None] != documents[:, None, :]
    return (later | other)[:, None]
