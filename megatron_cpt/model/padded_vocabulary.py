"""Rows of padding in embedding and output layer: without them the model computes what the unpadded model computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch.nn.parameter import Parameter

from megatron_cpt.config import ModelConfig


class _ExcludeColumns(torch.autograd.Function):
    """Set the last columns of the logits to -inf in place.

    The softmax of an excluded column is 0, so the gradient that arrives there is 0 already and passes unchanged.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, first: int) -> torch.Tensor:
        ctx.mark_dirty(logits)
        logits[..., first:] = float("-inf")
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def exclude_padding(chunk: GPTModel, model: ModelConfig) -> None:
    """Make the logits of ids at and above `model.vocab` -inf, so they have no part in the softmax and its gradient.

    Example: 500 ids padded to 512 at TP 4 have 128 columns per rank. Rank 3 excludes its columns from 116 on, the
    other ranks none.

    Megatron-LM lets the padding take part. Logits of rows of zeros are 0; if a trained model's logits are around -6.6,
    12 of these rows raise the loss by 3 nats.
    """
    if model.padding_in_softmax or not chunk.post_process:
        return
    columns = model.padded_vocab // parallel_state.get_tensor_model_parallel_world_size()
    first = max(0, model.vocab - parallel_state.get_tensor_model_parallel_rank() * columns)
    if first < columns:

        def exclude(module: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
            logits, bias = output
            return _ExcludeColumns.apply(logits, first), bias  # type: ignore[no-untyped-call]

        chunk.output_layer.register_forward_hook(exclude)


@torch.no_grad()
def zero_padding(chunks: Sequence[torch.nn.Module], model: ModelConfig) -> None:
    """Set the rows of padding to zero, where neither gradients nor weight decay move them."""
    if model.padding_in_softmax or model.padded_vocab == model.vocab:
        return
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                assert isinstance(parameter, Parameter)
                rows = len(parameter)
                first = model.vocab - parallel_state.get_tensor_model_parallel_rank() * rows
                parameter[max(0, first) :] = 0.0
