"""One micro-batch forward: arrays -> tensors -> summed loss, by source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_cpt.data import Batch
from megatron_cpt.model.build_model import Model


@dataclass(frozen=True)
class ForwardPass:
    """Runs micro-batches through the pipeline.

    Attributes:
        model: the chunks of this rank.
        num_sources: length of the loss-by-source vectors.
        context_parallel_size: ranks that a sequence is spread over.
        device: where to compute.
    """

    model: Model
    num_sources: int
    context_parallel_size: int
    device: torch.device

    def __call__(self, micro_batches: Sequence[Batch], *, train: bool) -> torch.Tensor:
        """Forward, and backward where `train`.

        Args:
            micro_batches: of one shape; that of another call may be another one.
            train: whether to go backward.

        Returns:
            (num_sources, 2) float64 on the CPU: summed loss and tokens by source, of this rank's micro-batches;
            zeros on every stage but the last.
        """
        chunks = list(self.model.chunks)
        micro_batch, length = micro_batches[0].tokens.shape
        if self._packs(micro_batches[0]):
            micro_batch, length = 1, micro_batch * length
        iterators = [iter(micro_batches) for _ in chunks]  # every virtual stage walks all micro-batches
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=micro_batch,
            forward_only=not train,
        )
        total = torch.zeros(self.num_sources, 2, dtype=torch.float64)
        for report in reports:
            total += report["loss_by_source"].to("cpu")
        return total

    def _forward_step(
        self, micro_batches: Iterator[Batch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        batch = next(micro_batches)
        tensors = self._tensors(batch)
        inputs, packing = [tensors[name] for name in ("tokens", "position_ids", "labels")], {}
        if self._packs(batch):
            assert batch.attention_documents is not None
            inputs = [tensor.view(1, -1) for tensor in inputs]
            packing = {"packed_seq_params": packed_sequences(batch.attention_documents, self.device)}
        tokens, position_ids, labels = inputs
        output = chunk(tokens, position_ids, tensors.get("attention_mask"), labels=labels, **packing)
        sources = torch.from_numpy(batch.sources).to(self.device)

        def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            mask = tensors["loss_mask"]
            return self._loss(losses.view(mask.shape), mask, sources)

        return output, loss_func

    def _packs(self, batch: Batch) -> bool:
        """Whether the micro-batch goes through the model as one row of packed documents."""
        return batch.attention_documents is not None and self.model.packs_documents

    def _tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        tensors = {
            "tokens": torch.from_numpy(batch.tokens),
            "labels": torch.from_numpy(batch.labels),
            "loss_mask": torch.from_numpy(batch.loss_mask),
            "position_ids": torch.from_numpy(batch.position_ids),
        }
        if batch.attention_documents is not None and not self._packs(batch):
            tensors["attention_mask"] = document_mask(torch.from_numpy(batch.attention_documents))
        tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        if self.context_parallel_size > 1:
            from megatron.core.utils import get_batch_on_this_cp_rank

            tensors = get_batch_on_this_cp_rank(tensors)
        return tensors

    def _loss(
        self, losses: torch.Tensor, mask: torch.Tensor, sources: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Summed loss, token count and the report; megatron-core divides gradients by all tokens of the step.

        A mean over tokens (not over micro-batches) is what makes the loss the same for every way to divide a step.
        """
        masked = losses.float() * mask
        by_source = torch.zeros(self.num_sources, 2, dtype=torch.float64, device=losses.device)
        per_sample = torch.stack([masked.detach().sum(dim=1), mask.sum(dim=1)], dim=1).double()
        by_source.index_add_(0, sources, per_sample)
        return masked.sum(), mask.sum().int(), {"loss_by_source": by_source}


def packed_sequences(documents: npt.NDArray[np.int32], device: torch.device) -> PackedSeqParams:
    """Documents as sequences of their own, for attention kernels that take no mask.

    The samples of a micro-batch lie one behind the other, and a new sequence begins with each sample and each document:
    no token sees another document, as with `document_mask`. Positions begin at 0 in each sequence, which rotary
    embeddings cannot tell from positions in the sample: scores depend on distances only.

    Args:
        documents: (b, s) number of the document that each token is in.
        device: where the model computes.

    Returns:
        megatron-core's `thd` format, with the first place of each sequence, and of what follows the last one.
    """
    begins = np.ones(documents.shape, np.bool_)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    bounds = np.append(np.flatnonzero(begins), documents.size).astype(np.int32)
    longest = int(np.diff(bounds).max())
    offsets = torch.from_numpy(bounds).to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """Where a query must not look: later tokens and other documents.

    Args:
        documents: (b, s) number of the document that each token is in.

    Returns:
        bool (b, 1, s, s), True where attention is forbidden (megatron-core's meaning).
    """
    length = documents.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=documents.device).triu(1)
    other = documents[:, :, None] != documents[:, None, :]
    return (later | other)[:, None]
