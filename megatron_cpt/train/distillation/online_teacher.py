"""Teacher that runs beside the student: a second model, forward only.

Its last model chunk returns hidden states (after the final norm) in place of logits. A hidden state is far smaller than
the logits of a vocabulary, so the hidden states of all micro-batches of a step are kept, and the loss computes the
teacher's logits for the tokens of one piece at a time. With one pipeline stage even the hidden states exist for one
micro-batch only; with several, a forward-only pass of all micro-batches precedes the student's passes.

A teacher with one stage beside a student with several is on the ranks of the student's last stage only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import nn

from megatron_cpt.checkpoint.state.state_dicts import unwrap
from megatron_cpt.model.build_model import Model
from megatron_cpt.train.device_batch import DeviceBatch, model_inputs
from megatron_cpt.train.distillation.distilled_loss import Targets, all_reduced, row_maximum


@dataclass(frozen=True)
class OnlineTargets:
    """Full distributions, computed from hidden states when they are compared.

    Attributes:
        states: (s x b, hidden) final hidden states of the teacher.
        weight: (columns, hidden) output layer of the teacher in the columns of this rank.
        temperature: divisor of the logits.
    """

    states: torch.Tensor
    weight: torch.Tensor
    temperature: float

    def divergence(
        self, rows: slice, scaled: torch.Tensor, log_sum: torch.Tensor, q: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compare some tokens with the teacher; see `Targets.divergence`."""
        log_p = nn.functional.linear(self.states[rows], self.weight).float()
        log_p -= all_reduced(row_maximum(log_p), dist.ReduceOp.MAX)[:, None]
        log_p /= self.temperature
        log_p -= all_reduced(log_p.exp().sum(dim=-1)).log_()[:, None]
        p = log_p.exp()
        log_q = scaled.sub_(log_sum[:, None])
        log_ratio = log_p.sub_(log_q)
        # Both distributions sum to 1, so exp(log q) - p adds 0. It cancels the rounding errors of the two
        # normalizations, which are as large as a small divergence; `q` has rounding errors of its own.
        divergence = all_reduced(log_ratio.mul_(p).add_(log_q.exp_()).sub_(p).sum(dim=-1))
        q.addcmul_(p, weights[:, None], value=-1.0)
        return divergence


class OnlineTeacher:
    """Model that gives targets; see the module.

    Args:
        model: the teacher's chunks on this rank, loaded; its output layer is replaced. Without chunks the rank runs no
            part of the teacher.
        columns: columns of the student's logits on this rank, as rows of the teacher's output layer on this rank.
        layout: returns a context in which megatron-core sees the layout of the teacher.
        temperature: divisor of the logits.
        distilled: indices of the sources that are distilled.
        digest: hash of the checkpoint.
    """

    def __init__(
        self,
        model: Model,
        columns: slice,
        *,
        layout: Callable[[], AbstractContextManager[None]],
        temperature: float,
        distilled: frozenset[int],
        digest: str,
    ) -> None:
        self.digest, self._layout = digest, layout
        self._model, self._temperature, self._distilled = model, temperature, distilled
        self._weight: torch.Tensor | None = None
        for chunk in model.chunks:
            chunk.eval()
            if unwrap(chunk).post_process:
                self._weight = _replace_output_layer(unwrap(chunk))[columns]

    def targets(self, micro_batches: Sequence[DeviceBatch]) -> Iterator[Targets | None]:
        """Yield the targets of each micro-batch; see `Teacher.targets`."""
        is_chosen = [not self._distilled.isdisjoint(batch.source_set) for batch in micro_batches]
        chosen = list(compress(micro_batches, is_chosen))
        has_stages = self._model.config.pipeline_model_parallel_size > 1
        states = iter(self._run_pipeline(chosen)) if has_stages else map(self._forward, chosen)
        return (self._targets(next(states)) if is_next else None for is_next in is_chosen)

    def _targets(self, states: torch.Tensor) -> OnlineTargets:
        """Return the targets of states (b, s of this rank, hidden)."""
        assert self._weight is not None, "only the last stage reads targets"
        by_position = states.transpose(0, 1).contiguous()
        if self._model.config.sequence_parallel:
            with self._layout():
                by_position = gather_from_sequence_parallel_region(by_position)
        return OnlineTargets(by_position.view(-1, by_position.shape[-1]), self._weight, self._temperature)

    @torch.no_grad()
    def _forward(self, batch: DeviceBatch) -> torch.Tensor:
        (chunk,) = self._model.chunks
        with self._layout():
            return self._run_chunk(batch, chunk)

    def _run_chunk(self, batch: DeviceBatch, chunk: nn.Module) -> torch.Tensor:
        inputs = model_inputs(batch, self._model.config.context_parallel_size)
        output: torch.Tensor = chunk(*inputs.positional, **inputs.packing)
        return output

    @torch.no_grad()
    def _run_pipeline(self, micro_batches: Sequence[DeviceBatch]) -> Sequence[torch.Tensor]:
        """Return the hidden states of each micro-batch, on the last stage only."""
        if not micro_batches:
            return []
        chunks, config = list(self._model.chunks), self._model.config
        rows, length = micro_batches[0].row_shape
        # the interleaved schedule takes multiples of the number of stages
        excess = -len(micro_batches) % config.pipeline_model_parallel_size if len(chunks) > 1 else 0
        filled = [*micro_batches, *[micro_batches[-1]] * excess]
        iterators = [iter(filled) for _ in chunks]

        def forward_step(batches: Iterator[DeviceBatch], chunk: nn.Module) -> tuple[torch.Tensor, Any]:
            return self._run_chunk(next(batches), chunk), lambda states, **_: states.to(config.params_dtype)

        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(filled),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return list(found[: len(micro_batches)])


class _KeepStates(nn.Module):
    """Output layer that returns its input; `weight` is for models that share it with the embedding."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return states, None


def _replace_output_layer(model: Any) -> torch.Tensor:
    """Make a GPTModel return hidden states; return the weight (columns of this rank, hidden) of its output layer."""
    is_shared = model.share_embeddings_and_output_weights
    weight: torch.Tensor = model.shared_embedding_or_output_weight() if is_shared else model.output_layer.weight
    model.output_layer = _KeepStates(weight)
    return weight.detach()
