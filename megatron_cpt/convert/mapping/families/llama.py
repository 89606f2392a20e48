"""Llama 2 and 3.x (arXiv 2307.09288, 2407.21783), and other models with the model type `llama`."""

from __future__ import annotations

from megatron_cpt.config import Activation
from megatron_cpt.convert.mapping.families.base import COMMON_DEFAULTS, Family
from megatron_cpt.convert.mapping.families.common import ATTENTION, ATTENTION_BIASES, EMBEDDINGS, GATED_MLP, NORMS

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    weights=(*EMBEDDINGS, *NORMS, *ATTENTION, *ATTENTION_BIASES, *GATED_MLP),
    fixed={"gated": True, "norm": "rmsnorm", "qkv_bias": False, "qk_norm": False},
    activations=(Activation.SILU, Activation.GELU, Activation.GELU_TANH),
    defaults={**COMMON_DEFAULTS, "max_position_embeddings": 2048},
    has_linear_bias=True,
)
