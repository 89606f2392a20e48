"""Floating-point operations of training, by formula.

A matrix product costs 2 operations per weight and token forward and 4 backward, 6 in total (Kaplan et al., arXiv
2001.08361). Looking up an embedding costs none, so only the head counts. Attention multiplies each query with every key
and each score with every value: 2 x 2 x seq_length x queries forward, three times as many in training (PaLM, arXiv
2204.02311, appendix B). Norms, activations, softmax and recomputation do not count, as in published MFU figures.

A causal model needs only half of the attention, but many published figures count all of it, so both are reported.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config import ModelConfig
from megatron_cpt.planning.cost.parameters import count_parameters, query_size


@dataclass(frozen=True)
class FlopsPerToken:
    """Operations of training on one token, with attention to every key (`full`) and with half of it (`causal`)."""

    full: float
    causal: float


def flops_per_token(model: ModelConfig, seq_length: float) -> FlopsPerToken:
    """Return the operations of training, forward and backward, on one token of a sequence of `seq_length`.

    The head counts without padding rows, whose work is not useful.
    """
    parameters = count_parameters(model)
    matmul = parameters.num_layers * parameters.layer.matmul + model.vocab * model.hidden
    attention = 12 * model.layers * seq_length * query_size(model)
    return FlopsPerToken(full=float(6 * matmul + attention), causal=float(6 * matmul + attention / 2))
