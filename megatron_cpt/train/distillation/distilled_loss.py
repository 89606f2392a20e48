"""Loss of distillation: cross entropy and divergence from a teacher, with the vocabulary divided over ranks.

The loss of a token is (Hinton et al., arXiv 1503.02531, section 2, with the divergence in place of the cross entropy
with soft targets, whose gradients are equal)

    (1 - w) x CE + w x T^2 x KL(teacher || student)

where both distributions of the divergence are softmaxes of logits / T. Its gradient in the logits is

    (1 - w) x (softmax(logits) - one_hot(label)) + w x T x (softmax(logits / T) - teacher).

The logits are read in pieces of some rows, and each piece is overwritten by its gradient. So one tensor of the size of
the logits exists, in their own format; fp32 copies and the teacher's logits exist for one piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cpt.config import ModelConfig
from megatron_cpt.train.device_batch import DeviceBatch


@dataclass(frozen=True)
class VocabularyShard:
    """Columns of the logits on this tensor-parallel rank, without padding.

    Example: 500 ids padded to 512 at TP 4 have 128 columns per rank; the shard of rank 3 is ids 384 to 499.

    Attributes:
        first: id of the first column.
        columns: number of columns; 0 if all columns of this rank are padding.
    """

    first: int
    columns: int

    @classmethod
    def of(cls, model: ModelConfig) -> VocabularyShard:
        """Return the shard of this rank."""
        padded = model.padded_vocab // parallel_state.get_tensor_model_parallel_world_size()
        first = parallel_state.get_tensor_model_parallel_rank() * padded
        return cls(first, min(padded, max(0, model.vocab - first)))


class Targets(Protocol):
    """Distributions of the teacher over the next token, for all tokens of one micro-batch."""

    def divergence(
        self, rows: slice, scaled: torch.Tensor, log_sum: torch.Tensor, q: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compare some tokens with the teacher; a collective call of the tensor-parallel group.

        Args:
            rows: n tokens in the order of the logits [s, b]: token = position x b + sample.
            scaled: (n, columns) fp32, logits of the student over the temperature in the columns of this rank, each row
                up to a constant; may be overwritten.
            log_sum: (n,) logarithm of the sum of their exponentials over the whole vocabulary.
            q: (n, columns) fp32, the student's probabilities exp(scaled - log_sum); they become q - weights * target.
                The target is the teacher's distribution, so q - target is the gradient of the divergence in `scaled`.
            weights: (n,) fp32.

        Returns:
            (n,) fp32 KL(teacher || student) over the whole vocabulary.
        """


class Teacher(Protocol):
    """Source of targets.

    Attributes:
        digest: hash of the teacher's content; a resume with another teacher is a change of the run.
    """

    digest: str

    def targets(self, micro_batches: Sequence[DeviceBatch]) -> Iterator[Targets | None]:
        """Yield the targets of each micro-batch of a step, in order; None: the micro-batch is not distilled.

        Every rank calls it once per step, and the ranks of a replica together. Only the last pipeline stage reads it.
        """


@dataclass(frozen=True)
class LossOptions:
    """Constants of the loss.

    Attributes:
        shard: columns of the logits that are no padding.
        temperature: divisor of the logits in the divergence.
        padding_in_softmax: the padding takes part in the softmax of the cross entropy.
        piece_elements: largest number of logits per piece.
    """

    shard: VocabularyShard
    temperature: float
    padding_in_softmax: bool
    piece_elements: int


@dataclass(frozen=True)
class TokenLosses:
    """Losses of the tokens of one micro-batch, (s, b) fp32 each.

    Attributes:
        total: the loss to train on; only it has a gradient.
        cross_entropy, divergence: its parts, without weights.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: torch.Tensor


def distilled_losses(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, targets: Targets, options: LossOptions
) -> TokenLosses:
    """Return the losses of a micro-batch, and overwrite its logits; a collective call of the tensor-parallel group.

    Args:
        logits: (s, b, columns of this rank); nothing else may read them, as with megatron-core's cross entropy.
        labels: (s, b) ids.
        weights: (s, b) fp32, share of the divergence in the loss of each token.
        targets: the teacher.
        options: constants of the loss.
    """
    flat = (logits.view(-1, logits.shape[-1]), labels.reshape(-1), weights.reshape(-1))
    parts = _DistilledLoss.apply(*flat, targets, options)  # type: ignore[no-untyped-call]
    return TokenLosses(*(part.view(labels.shape) for part in parts))


@torch.no_grad()
def measured_divergence(
    logits: torch.Tensor, labels: torch.Tensor, targets: Targets, options: LossOptions
) -> torch.Tensor:
    """Return the divergence (s, b) of a micro-batch, and leave its logits unchanged; see `distilled_losses`."""
    flat = (
        logits.view(-1, logits.shape[-1]),
        labels.reshape(-1),
        labels.new_zeros(labels.numel(), dtype=torch.float32),
    )
    return _losses(*flat, targets, options, overwrite=False)[1].view(labels.shape)


class _DistilledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        targets: Targets,
        options: LossOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cross_entropy, divergence = _losses(logits, labels, weights, targets, options, overwrite=True)
        ctx.save_for_backward(logits)  # now its gradient
        ctx.mark_non_differentiable(cross_entropy, divergence)
        total = (1.0 - weights) * cross_entropy + weights * options.temperature**2 * divergence
        return total, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None, None, None]:
        (by_logit,) = ctx.saved_tensors
        by_logit.mul_(gradient[:, None])
        return by_logit, None, None, None, None


def _losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    targets: Targets,
    options: LossOptions,
    *,
    overwrite: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cross entropy and divergence (n,) of all tokens; with `overwrite` the logits become their gradient."""
    cross_entropy, divergence = torch.empty_like(weights), torch.empty_like(weights)
    size = max(1, options.piece_elements // logits.shape[1])
    for first in range(0, len(logits), size):
        rows = slice(first, min(first + size, len(logits)))
        piece = logits[rows].to(torch.float32, copy=not overwrite)
        cross_entropy[rows], divergence[rows] = _piece(piece, labels[rows], weights[rows], rows, targets, options)
        if overwrite and piece.dtype != logits.dtype:
            logits[rows] = piece
    return cross_entropy, divergence


def _piece(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    rows: slice,
    targets: Targets,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cross entropy and divergence (n,) of some tokens; their logits, in fp32, become the gradient."""
    shard, temperature = options.shard, options.temperature
    shifted = logits - all_reduced(row_maximum(logits), dist.ReduceOp.MAX)[:, None]
    column = labels - shard.first
    is_here = (column >= 0) & (column < shard.columns)
    column = torch.where(is_here, column, 0)[:, None]
    predicted = torch.where(is_here, shifted.gather(1, column)[:, 0], 0.0)
    softmax = torch.exp(shifted, out=logits)
    predicted, exp_sum = all_reduced(torch.stack([predicted, softmax.sum(dim=-1)]))
    log_sum = exp_sum.log()
    cross_entropy = log_sum - predicted
    softmax.div_(exp_sum[:, None])
    label_weights = 1.0 - weights
    scaled, q = shifted[:, : shard.columns], softmax[:, : shard.columns]
    if temperature == 1.0 and not options.padding_in_softmax:  # one softmax serves both losses
        divergence = targets.divergence(rows, scaled, log_sum, q, weights)
        softmax.scatter_add_(1, column, -(label_weights * is_here)[:, None])
        return cross_entropy, divergence
    scaled = scaled / temperature
    exps = scaled.exp()
    exp_sum = all_reduced(exps.sum(dim=-1))
    by_scaled = exps.div_(exp_sum[:, None])
    divergence = targets.divergence(rows, scaled, exp_sum.log(), by_scaled, torch.ones_like(weights))
    softmax.scatter_add_(1, column, -is_here.float()[:, None])
    softmax.mul_(label_weights[:, None])
    q.addcmul_(by_scaled, (weights * temperature)[:, None])
    return cross_entropy, divergence


def row_maximum(values: torch.Tensor) -> torch.Tensor:
    """Return the largest value (n,) of each row; -inf for rows without columns, on a rank that has only padding."""
    return values.amax(dim=-1) if values.shape[1] else values.new_full((len(values),), float("-inf"))


def all_reduced(values: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce values over the tensor-parallel group, in place, and return them."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.all_reduce(values, operation, group=parallel_state.get_tensor_model_parallel_group())
    return values
