"""Floating-point operations of training, by formula.

A matrix product costs 2 operations a weight and token forward, and twice that backward (Kaplan et al., arXiv
2001.08361): 6 in all. Looking up an embedding costs none, so only the head counts. Attention multiplies each query
with every key and each weight with every value: 2 x 2 x seq_length x queries forward, three times that in training
(PaLM, arXiv 2204.02311, appendix B). Norms, activations, softmax and recomputation are left out, as they are in the
MFU figures that others publish.

A causal model needs only half of the attention, but many figures count all of it; so always say which.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config import ModelConfig
from megatron_cpt.plan.cost.parameters import count_parameters, query_size


@dataclass(frozen=True)
class FlopsPerToken:
    """Operations of training on one token.

    Attributes:
        full: every query against every key of the sequence.
        causal: half of that attention, which is what a causal model needs.
    """

    full: float
    causal: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for `plan --json`."""
        return {"full": self.full, "causal": self.causal}


def flops_per_token(model: ModelConfig, seq_length: int) -> FlopsPerToken:
    """Operations of training (forward and backward) for one token of a sequence of `seq_length`.

    The head counts with the tokenizer's vocabulary: work on padding rows is not useful work.
    """
    parameters = count_parameters(model)
    matmul = parameters.num_layers * parameters.layer.matmul + model.vocab * model.hidden
    attention = 12 * model.layers * seq_length * query_size(model)
    return FlopsPerToken(full=float(6 * matmul + attention), causal=float(6 * matmul + attention / 2))
