"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases for queries, keys and values."""

from __future__ import annotations

from megatron_cpt.config import Activation
from megatron_cpt.convert.mapping.families.base import COMMON_DEFAULTS, Family
from megatron_cpt.convert.mapping.families.common import ATTENTION, EMBEDDINGS, GATED_MLP, NORMS, qkv

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    weights=(*EMBEDDINGS, *NORMS, *ATTENTION, qkv("bias"), *GATED_MLP),
    fixed={"gated": True, "norm": "rmsnorm", "qkv_bias": True, "qk_norm": False},
    activations=(Activation.SILU, Activation.GELU, Activation.GELU_TANH),
    defaults={
        **COMMON_DEFAULTS,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    extra={"use_sliding_window": False, "sliding_window": None},
)
