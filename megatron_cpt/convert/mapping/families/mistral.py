"""Mistral (arXiv 2310.06825): Llama's weights. Sliding windows (version 0.1) are refused if they matter."""

from __future__ import annotations

from megatron_cpt.config import Activation
from megatron_cpt.convert.mapping.families.base import COMMON_DEFAULTS, Family
from megatron_cpt.convert.mapping.families.common import ATTENTION, EMBEDDINGS, GATED_MLP, NORMS

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    weights=(*EMBEDDINGS, *NORMS, *ATTENTION, *GATED_MLP),
    fixed={"gated": True, "norm": "rmsnorm", "qkv_bias": False, "qk_norm": False},
    activations=(Activation.SILU, Activation.GELU, Activation.GELU_TANH),
    defaults={**COMMON_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    extra={"sliding_window": None},
)
