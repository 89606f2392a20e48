"""Qwen3, dense (arXiv 2505.09388): Llama with RMSNorm over each query and key head, and a separate `head_dim`."""

from __future__ import annotations

from megatron_cpt.config import Activation
from megatron_cpt.convert.mapping.families.base import COMMON_DEFAULTS, Family
from megatron_cpt.convert.mapping.families.common import ATTENTION, EMBEDDINGS, GATED_MLP, NORMS, QK_NORMS

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    weights=(*EMBEDDINGS, *NORMS, *ATTENTION, *QK_NORMS, *GATED_MLP),
    fixed={"gated": True, "norm": "rmsnorm", "qkv_bias": False, "qk_norm": True},
    activations=(Activation.SILU, Activation.GELU, Activation.GELU_TANH),
    defaults={
        **COMMON_DEFAULTS,
        "head_dim": 128,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    extra={"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
)
