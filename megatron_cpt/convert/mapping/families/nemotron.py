"""Nemotron-4 and Minitron (arXiv 2402.16819, 2407.14679): squared ReLU, LayerNorm1P, RoPE over half of each head.

Both sides store a norm's weight minus 1, so norms are copied unchanged.
"""

from __future__ import annotations

from megatron_cpt.config import Activation
from megatron_cpt.convert.mapping.families.base import COMMON_DEFAULTS, Family
from megatron_cpt.convert.mapping.families.common import ATTENTION, ATTENTION_BIASES, EMBEDDINGS, NORMS, PLAIN_MLP

NEMOTRON = Family(
    name="nemotron",
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    weights=(*EMBEDDINGS, *NORMS, *ATTENTION, *ATTENTION_BIASES, *PLAIN_MLP),
    fixed={"gated": False, "norm": "layernorm1p", "qkv_bias": False, "qk_norm": False},
    activations=(Activation.SQUARED_RELU, Activation.GELU, Activation.GELU_TANH, Activation.SILU),
    defaults={
        **COMMON_DEFAULTS,
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "initializer_range": 0.0134,
        "max_position_embeddings": 4096,
    },
    norm_eps_key="norm_eps",
    has_linear_bias=True,
    has_partial_rope=True,
)
