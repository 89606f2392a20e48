"""Teacher whose distributions are read from a cache: its k most likely tokens and one bucket for all others.

The teacher's distribution is merged into k + 1 outcomes, and so is the student's: the k tokens of the record, and "any
other token" (also called ghost token, arXiv 2503.16870). With p for the teacher and q for the student:

    KL = sum over the k tokens of p_i (log p_i - log q_i)  +  p_rest (log p_rest - log q_rest)

Merging outcomes never increases a divergence (the log-sum inequality), so this is a lower bound of the full KL. It
falls short by p_rest * KL(the teacher's tail || the student's tail), both tails normalized.

    gradient in the logit of a token of the record:  q_i - p_i
    gradient in the logit of another token j:        q_j - p_rest * q_j / q_rest

q_rest is the sum of the probabilities of the other tokens. 1 minus the sum of the k probabilities would lose all digits
where the student is sure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_cpt.train.device_batch import DeviceBatch
from megatron_cpt.train.distillation.distilled_loss import Targets, VocabularyShard, all_reduced

_SMALLEST = 1e-30  # of q_rest, whose logarithm is taken


@dataclass(frozen=True)
class TopKTargets:
    """Distributions of a cached teacher for the tokens of one micro-batch; see the formulas of the module.

    Attributes:
        ids: (tokens, k), in the order of the flattened logits; all k are different.
        log_probs: (tokens, k).
        log_tail: (tokens,).
        shard: columns of the vocabulary on this rank.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    log_tail: torch.Tensor
    shard: VocabularyShard

    def divergence(
        self, rows: slice, scaled: torch.Tensor, log_sum: torch.Tensor, q: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compare some tokens with the teacher; see `Targets.divergence`.

        The target has the teacher's k probabilities, and the student's tail scaled to p_rest.
        """
        if not self.shard.columns:  # this rank has only padding
            scaled = q = q.new_zeros(len(q), 1)
        merged = torch.cat([self.log_probs[rows], self.log_tail[rows, None]], dim=1).float()
        log_p = torch.log_softmax(merged, dim=1)  # exactly a distribution, in spite of the rounding of fp16
        p = log_p.exp()
        columns = self.ids[rows].long() - self.shard.first
        is_here = (columns >= 0) & (columns < self.shard.columns)
        columns = torch.where(is_here, columns, 0)
        own_log_q = torch.where(is_here, scaled.gather(1, columns) - log_sum[:, None], 0.0)
        own_q = torch.where(is_here, q.gather(1, columns), 0.0)
        q.scatter_add_(1, columns, -own_q)  # exactly 0 for tokens of the record
        summed = all_reduced(torch.cat([own_log_q, q.sum(dim=1, keepdim=True)], dim=1))
        log_q_top, q_rest = summed[:, :-1], summed[:, -1].clamp_min(_SMALLEST)
        log_ratio = log_p - torch.cat([log_q_top, q_rest.log()[:, None]], dim=1)
        # Both distributions sum to 1, so q - p adds 0; it cancels rounding errors, see `OnlineTargets`.
        difference = torch.cat([log_q_top.exp(), q_rest[:, None]], dim=1) - p
        divergence = (p * log_ratio + difference).sum(dim=1)
        q.mul_((1.0 - weights * p[:, -1] / q_rest)[:, None])
        q.scatter_add_(1, columns, torch.where(is_here, own_q - weights[:, None] * p[:, :-1], 0.0))
        return divergence


@dataclass
class CacheTeacher:
    """Teacher that reads nothing itself: the loader has put the records into the micro-batches.

    Attributes:
        digest: of the weights that the cache was made with.
        shard: columns of the vocabulary on this rank.
        distilled: indices of the sources that are distilled.
        context_parallel_size: ranks that share a sequence.
    """

    digest: str
    shard: VocabularyShard
    distilled: frozenset[int]
    context_parallel_size: int = 1

    def targets(self, micro_batches: Sequence[DeviceBatch]) -> Iterator[Targets | None]:
        """Yield the targets of each micro-batch; None also on ranks whose loader reads no records."""
        for batch in micro_batches:
            yield self._targets(batch) if batch.source_set & self.distilled else None

    def _targets(self, batch: DeviceBatch) -> Targets | None:
        ids, log_probs, log_tail = batch.teacher_ids, batch.teacher_log_probs, batch.teacher_log_tail
        if ids is None or log_probs is None or log_tail is None:
            return None
        # torch has few operations for unsigned types
        tensors = {"ids": ids.to(torch.int32), "log_probs": log_probs, "log_tail": log_tail}
        if self.context_parallel_size > 1:
            from megatron.core.utils import get_batch_on_this_cp_rank

            tensors = get_batch_on_this_cp_rank(tensors)
        is_packed = batch.sequence_bounds is not None
        # the logits are [s, b, v], or [b * s, 1, v] where documents are packed
        ordered = tensors if is_packed else {name: tensor.transpose(0, 1) for name, tensor in tensors.items()}
        return TopKTargets(**{name: tensor.flatten(0, 1) for name, tensor in ordered.items()}, shard=self.shard)
